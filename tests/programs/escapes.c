// escapes FILE: sets the size of FILE and of FILE.b again and again, first one and
// then the other, by system calls that no site and no symbol stands for.
//
// OLD: a 32-bit call; MEMORY: code in a memory file; else code in anonymous memory.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifdef OLD
static long resize(long file, long size) {
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(93), "b"(file), "c"(size) : "memory");
    return result;
}
#else
// mov $77,%eax; syscall; ret
static const unsigned char code[] = {0xb8, 77, 0, 0, 0, 0x0f, 0x05, 0xc3};
static long (*resize)(long file, long size);

static void make(void) {
#ifdef MEMORY
    int file = memfd_create("plugin", 0);
    if (file < 0 || write(file, code, sizeof code) < 0)
        _exit(1);
    void *at = mmap(0, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, file, 0);
#else
    void *at = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(at, code, sizeof code);
    mprotect(at, 4096, PROT_READ | PROT_EXEC);
#endif
    memcpy(&resize, &at, sizeof at);
}
#endif

int main(int argc, char **argv) {
    char other[4096];
    snprintf(other, sizeof other, "%s.b", argv[argc - 1]);
    int a = open(argv[argc - 1], O_RDWR | O_CREAT, 0644);
    int b = open(other, O_RDWR | O_CREAT, 0644);
#ifndef OLD
    make();
#endif
    for (long size = 1; size < 1L << 30; size++)
        if (resize(a, size) < 0 || resize(b, size) < 0)
            return 1;
    return 0;
}
