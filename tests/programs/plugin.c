// host PLUGIN FILE: loads a library, by dlopen, that writes to FILE with a system
// call instruction of its own, over and over. With -DPLUGIN: that library.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

#ifdef PLUGIN
long plugin_write(int fd, const void *bytes, unsigned long len) {
    long result;
    register long offset __asm__("r10") = 0;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(18L), "D"((long)fd), "S"(bytes), "d"(len), "r"(offset)
                     : "rcx", "r11", "memory");
    return result;
}
#else
int main(int argc, char **argv) {
    if (argc != 3)
        return 2;
    void *library = dlopen(argv[1], RTLD_NOW);
    int fd = open(argv[2], O_RDWR | O_CREAT | O_TRUNC, 0600);
    long (*plugin_write)(int, const void *, unsigned long) =
        library ? (long (*)(int, const void *, unsigned long))dlsym(library, "plugin_write") : 0;
    if (!plugin_write || fd < 0)
        return 1;
    for (;;) {
        plugin_write(fd, "written by the plugin", 21);
        usleep(500);
    }
}
#endif
