// Walks through system calls one instruction at a time (the trap flag), and at each
// unwinds the stack as pthread_cancel, C++ and debuggers do: the walk must find its
// way back to main from everywhere. Prints how many instructions there were and
// from how many the way was lost.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
#include <unwind.h>

static volatile unsigned long steps, lost;
static char *begin_of_main, *end_of_main;
static struct { void *at; const char *what; } first[8];
static const char *volatile what;

struct walk {
    int found, frames;
};

static _Unwind_Reason_Code frame(struct _Unwind_Context *context, void *data) {
    struct walk *walk = data;
    char *at = (char *)_Unwind_GetIP(context);
    if (at >= begin_of_main && at < end_of_main) {
        walk->found = 1;
        return _URC_NORMAL_STOP;
    }
    return ++walk->frames < 64 ? _URC_NO_REASON : _URC_NORMAL_STOP;
}

static void on_trap(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)info;
    struct walk walk = {0, 0};
    _Unwind_Backtrace(frame, &walk);
    steps++;
    if (!walk.found) {
        if (lost < 8) {
            first[lost].at = (void *)((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
            first[lost].what = what;
        }
        lost++;
    }
}

#define STEP(call)                                                             \
    do {                                                                       \
        what = #call;                                                          \
        __asm__ volatile("pushfq; orl $0x100, (%%rsp); popfq" ::: "memory", "cc"); \
        (void)(call);                                                          \
        __asm__ volatile("pushfq; andl $~0x100, (%%rsp); popfq" ::: "memory", "cc"); \
    } while (0)

__attribute__((noinline)) int main(int argc, char **argv) {
    begin_of_main = (char *)main;
    end_of_main = (char *)&&end;
    if (argc != 2)
        return 2;
    // The unwinder loads what it needs at its first use.
    struct walk walk = {0, 0};
    _Unwind_Backtrace(frame, &walk);
    struct sigaction action = {.sa_flags = SA_SIGINFO | SA_NODEFER};
    action.sa_sigaction = on_trap;
    sigaction(SIGTRAP, &action, 0);
    int fd = open(argv[1], O_RDWR | O_CREAT | O_TRUNC, 0600);
    char bytes[64] = "bytes";
    write(fd, bytes, 1); // claims the slot: not what is looked at here
    STEP(write(fd, bytes, sizeof bytes));
    STEP(pwrite(fd, bytes, 8, 100));
    STEP(ftruncate(fd, 4096));
    STEP(fallocate(fd, 0, 0, 8192));
    STEP(lseek(fd, 0, SEEK_SET));
    STEP(copy_file_range(fd, 0, fd, 0, 0, 0));
    STEP(syscall(SYS_pwrite64, fd, bytes, 8, 0));
    STEP(syscall(SYS_getppid));
    STEP(fsync(fd));
    STEP(close(dup(fd)));
    STEP(unlink(argv[1]));
    for (unsigned long i = 0; i < lost && i < 8; i++) {
        Dl_info info = {0};
        dladdr(first[i].at, &info);
        printf("lost at %s+%#lx in %s\n", info.dli_fname ? info.dli_fname : "?",
               (unsigned long)((char *)first[i].at - (char *)info.dli_fbase), first[i].what);
    }
    printf("%lu instructions, lost %lu\n", steps, lost);
    return 0;
end:
    return 1;
}
