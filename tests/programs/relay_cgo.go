package main

// #include <unistd.h>
import "C"

// Something of libc, so that the program is linked with it.
func init() {
	C.getpid()
}
