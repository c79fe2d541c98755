// paths-go NAME FILE N: see paths.c.
package main

import (
	"fmt"
	"os"
	"strconv"
	"syscall"
	"time"
)

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
}

func main() {
	if len(os.Args) != 4 {
		os.Exit(2)
	}
	name, path := os.Args[1], os.Args[2]
	count, err := strconv.Atoi(os.Args[3])
	must(err)
	greet()
	begin, parent := time.Now(), os.Getppid()
	must(os.WriteFile(path, make([]byte, 16384), 0666))
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	must(err)
	i := 1
	for ; count == 0 || i <= count; i++ {
		record := []byte(fmt.Sprintf("%-30s %032d\n", name, i))
		switch name {
		case "write":
			_, err = file.WriteAt(record, int64(i%256*64))
		case "syscall":
			_, err = syscall.Pwrite(int(file.Fd()), record, int64(i%256*64))
		case "rename":
			must(os.WriteFile(path+".new", record, 0666))
			err = os.Rename(path+".new", path)
		default:
			os.Exit(2)
		}
		must(err)
		if count == 0 {
			time.Sleep(300 * time.Microsecond)
			if os.Getppid() != parent || time.Since(begin) > 120*time.Second {
				break
			}
		}
	}
	fmt.Fprintf(os.Stderr, "%s: %d records\n", name, i-1)
}
