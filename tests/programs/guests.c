// Things that programs do and that a guest in their process must not mind.
//   guests shared FILE     maps a library's file shared and executable
//   guests openat2         passes a bad pointer
//   guests fsize PROGRAM   runs a program that may write no file at all, nor memory that
//                          it executes
//   guests writable        writes to a page of its own text, made writable by itself
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv) {
    if (argc < 2)
        return 2;
    if (!strcmp(argv[1], "shared") && argc == 3) {
        int fd = open(argv[2], O_RDWR);
        struct stat stat;
        if (fd < 0 || fstat(fd, &stat))
            return 1;
        void *at = mmap(0, (size_t)stat.st_size, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
        // As the dynamic linker maps text: from its own offset in the file.
        for (off_t offset = 4096; offset < stat.st_size; offset += 4096)
            mmap(0, (size_t)(stat.st_size - offset), PROT_READ | PROT_EXEC, MAP_SHARED, fd, offset);
        return at == MAP_FAILED;
    }
    if (!strcmp(argv[1], "openat2"))
        return syscall(437, AT_FDCWD, "/", (void *)8, 24) != -1 || errno != EFAULT;
    if (!strcmp(argv[1], "fsize") && argc == 3) {
        struct rlimit none = {0, 0};
        prctl(65 /* PR_SET_MDWE */, 1, 0, 0, 0);
        setrlimit(RLIMIT_FSIZE, &none);
        execl(argv[2], argv[2], (char *)0);
        return 1;
    }
    if (!strcmp(argv[1], "writable")) {
        char *page = (char *)((unsigned long)main & ~4095UL);
        if (mprotect(page, 4096, PROT_READ | PROT_WRITE | PROT_EXEC))
            return 1;
        volatile char *byte = page;
        *byte = *byte;
        return 0;
    }
    return 2;
}
