/* odd NAME FILE N, as `paths`: system calls that no table of sites can hold, in a program
 * of their own, for they make the table of the whole file incomplete. */
#include "ways.h"
#include <sys/syscall.h>

/* An instruction whose number is not known before it runs. */
static void by_asm_number(long i)
{
    static volatile long number = SYS_pwrite64;
    long ret = number;
    register long r10 __asm__("r10") = place(i);
    __asm__ volatile("syscall"
                     : "+a"(ret)
                     : "D"((long)fd), "S"(rec), "d"((long)RECORD), "r"(r10)
                     : "rcx", "r11", "memory");
    check(ret, "asm");
}

static void by_int80(long i)
{
    /* Pointers of that way have 32 bits. */
    static char *low;
    long ret = 4; /* write */
    if (!low) {
        low = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1,
                   0);
        if (low == MAP_FAILED)
            die("mmap");
    }
    memcpy(low, rec, RECORD);
    lseek(fd, place(i), SEEK_SET);
    __asm__ volatile("int $0x80"
                     : "+a"(ret)
                     : "b"((long)fd), "c"(low), "d"((long)RECORD)
                     : "memory", "r8", "r9", "r10", "r11");
    errno = (int)-ret;
    check(ret, "int $0x80 (a kernel without it?)");
}

typedef ssize_t pwrite_like(int, const void *, size_t, off_t);

static void by_jit(long i)
{
    /* mov $17,%eax... the number is patched in; mov %rcx,%r10; syscall; ret */
    static unsigned char code[] = {0xb8, 0, 0, 0, 0, 0x49, 0x89, 0xca, 0x0f, 0x05, 0xc3};
    static void *page;
    if (!page) {
        int number = SYS_pwrite64;
        memcpy(code + 1, &number, sizeof number);
        page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memcpy(page, code, sizeof code);
        check(mprotect(page, 4096, PROT_READ | PROT_EXEC), "mprotect");
    }
    pwrite_like *function;
    memcpy(&function, &page, sizeof page);
    check(function(fd, rec, RECORD, place(i)), "jit");
}

static const struct way ways[] = {
    {"asm_number", by_asm_number, 0},
    {"int80", by_int80, 0},
    {"jit", by_jit, 0},
};

int main(int argc, char **argv)
{
    return run_way(argc, argv, ways, sizeof ways / sizeof *ways);
}
