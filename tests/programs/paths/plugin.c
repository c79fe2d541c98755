/* A library with a system call of its own. */
#include <sys/syscall.h>
#include <sys/types.h>

ssize_t plugin_pwrite(int fd, const void *bytes, size_t n, off_t at);

ssize_t plugin_pwrite(int fd, const void *bytes, size_t n, off_t at)
{
    long ret;
    register long r10 __asm__("r10") = at;
    __asm__ volatile("syscall"
                     : "=a"(ret)
                     : "a"(SYS_pwrite64), "D"((long)fd), "S"(bytes), "d"(n), "r"(r10)
                     : "rcx", "r11", "memory");
    return ret;
}
