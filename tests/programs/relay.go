// relay DIR: what relay.c does, by a static program with goroutines.
package main

import (
	"encoding/binary"
	"log"
	"os"
	"runtime"
)

func main() {
	open := func(path string) *os.File {
		file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
		if err != nil {
			log.Fatal(err)
		}
		return file
	}
	a, b := open(os.Args[1]+"/a"), open(os.Args[1]+"/b")
	beats := open(os.Getenv("SNAPSHIM_TEST_STATS"))
	put := func(file *os.File, k uint64) {
		if _, err := file.WriteAt(binary.LittleEndian.AppendUint64(nil, k), 0); err != nil {
			log.Fatal(err)
		}
	}
	// From one goroutine to the next, so that several threads take part.
	turn := make(chan uint64)
	for i := 0; i < 4; i++ {
		go func() {
			runtime.LockOSThread()
			for k := range turn {
				put(a, k)
				put(b, k)
				put(beats, k)
				go func() { turn <- k + 1 }()
			}
		}()
	}
	turn <- 1
	select {}
}
