/* suspect MODE DIR SECONDS
 *
 * Writes ordered records (lanes.h: 2 files, 1 lane, 16 KiB) in a way that hooks
 * on libc's symbols cannot see, or can see only in part. Built without
 * -DWITH_URING -DWITH_AIO it has no such modes. */
#include "lanes.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/syscall.h>
#ifdef WITH_URING
#include <liburing.h>
#endif
#ifdef WITH_AIO
#include <libaio.h>
#endif

static struct lanes l = {.files = 2, .lanes = 1, .record = 16384, .pace_us = 50};

/* asm: a system call of our own. */
static ssize_t by_asm(int file, int fd, const void *record, size_t n, off_t at)
{
    (void)file;
#if defined(__x86_64__)
    long ret;
    register long r10 __asm__("r10") = at;
    __asm__ volatile("syscall"
                     : "=a"(ret)
                     : "a"(SYS_pwrite64), "D"((long)fd), "S"(record), "d"(n), "r"(r10)
                     : "rcx", "r11", "memory");
    return ret;
#elif defined(__aarch64__)
    register long x0 __asm__("x0") = fd;
    register long x1 __asm__("x1") = (long)record;
    register long x2 __asm__("x2") = (long)n;
    register long x3 __asm__("x3") = at;
    register long x8 __asm__("x8") = SYS_pwrite64;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x1), "r"(x2), "r"(x3), "r"(x8) : "memory");
    return x0;
#else
#error "no system call for this machine"
#endif
}

/* syscall: through libc's syscall(). */
static ssize_t by_syscall(int file, int fd, const void *record, size_t n, off_t at)
{
    (void)file;
    return syscall(SYS_pwrite64, fd, record, n, at);
}

/* stdio: flushed by libc from within. */
static ssize_t by_stdio(int file, int fd, const void *record, size_t n, off_t at)
{
    static FILE *streams[16];
    if (!streams[file] && !(streams[file] = fdopen(dup(fd), "r+")))
        die("fdopen");
    if (fseek(streams[file], at, SEEK_SET) != 0)
        die("fseek");
    if (fwrite(record, 1, n, streams[file]) != n || fflush(streams[file]) != 0)
        die("fwrite");
    return (ssize_t)n;
}

/* mapped: by stores. */
static ssize_t by_mapping(int file, int fd, const void *record, size_t n, off_t at)
{
    static char *maps[16];
    size_t size = l.record * (size_t)l.lanes;
    if (!maps[file]) {
        maps[file] = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (maps[file] == MAP_FAILED)
            die("mmap");
    }
    memcpy(maps[file] + at, record, n);
    return (ssize_t)n;
}

#ifdef WITH_URING
/* uring: submitted to a ring. */
static ssize_t by_uring(int file, int fd, const void *record, size_t n, off_t at)
{
    static struct io_uring ring;
    static int ready;
    (void)file;
    if (!ready) {
        int failed = io_uring_queue_init(8, &ring, 0);
        if (failed) {
            errno = -failed;
            die("io_uring_queue_init");
        }
        ready = 1;
    }
    struct io_uring_cqe *done;
    io_uring_prep_write(io_uring_get_sqe(&ring), fd, record, (unsigned)n, (__u64)at);
    io_uring_submit(&ring);
    int waited;
    // The signal that ends the program interrupts the wait, not the write.
    while ((waited = io_uring_wait_cqe(&ring, &done)) == -EINTR)
        ;
    if (waited != 0) {
        errno = -waited;
        die("io_uring_wait_cqe");
    }
    int res = done->res;
    io_uring_cqe_seen(&ring, done);
    return res;
}
#endif

#ifdef WITH_AIO
/* aio: submitted to the kernel. */
static ssize_t by_aio(int file, int fd, const void *record, size_t n, off_t at)
{
    static io_context_t context;
    (void)file;
    if (!context && io_setup(8, &context) != 0)
        die("io_setup");
    struct iocb block, *blocks[] = {&block};
    struct io_event done;
    io_prep_pwrite(&block, fd, (void *)record, n, at);
    if (io_submit(context, 1, blocks) != 1)
        die("io_submit");
    if (io_getevents(context, 1, 1, &done, NULL) != 1)
        die("io_getevents");
    return (ssize_t)done.res;
}
#endif

/* setuid: gives up root after 200 records and goes on. */
static ssize_t then_setuid(int file, int fd, const void *record, size_t n, off_t at)
{
    static long records;
    (void)file;
    if (++records == 400) {
        if (setresgid(65534, 65534, 65534) != 0 || setresuid(65534, 65534, 65534) != 0)
            die("setresuid");
        atomic_fetch_add(&stats->turns, 1);
    }
    return pwrite(fd, record, n, at);
}

/* sandbox: after 200 records, any system call but the few it needs kills it. */
static void enter_sandbox(void)
{
    static const int allowed[] = {
        SYS_write,  SYS_pwrite64,   SYS_writev,        SYS_pwritev,         SYS_lseek,
        SYS_exit,   SYS_exit_group, SYS_clock_gettime, SYS_clock_nanosleep, SYS_rt_sigreturn,
        SYS_close,
    };
    enum { COUNT = sizeof allowed / sizeof *allowed };
    struct sock_filter code[2 * COUNT + 2];
    int n = 0;
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
                                             offsetof(struct seccomp_data, nr));
    for (int i = 0; i < COUNT; i++) {
        code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K,
                                                 (unsigned)allowed[i], 0, 1);
        code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    }
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
    struct sock_fprog program = {.len = (unsigned short)n, .filter = code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
        die("seccomp");
}

static ssize_t in_sandbox(int file, int fd, const void *record, size_t n, off_t at)
{
    static long records;
    (void)file;
    if (++records == 400) {
        enter_sandbox();
        atomic_fetch_add(&stats->turns, 1);
    }
    return pwrite(fd, record, n, at);
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    const char *mode = argv[1];
    l.dir = argv[2];
    stats_open();
    lanes_create(&l);
    struct sigaction term = {.sa_handler = lanes_on_term, .sa_flags = SA_RESTART};
    sigaction(SIGTERM, &term, NULL);
    end_in_time((unsigned)number(argv[3]));
    if (!strcmp(mode, "asm"))
        lane_writer = by_asm;
    else if (!strcmp(mode, "syscall"))
        lane_writer = by_syscall;
    else if (!strcmp(mode, "stdio"))
        lane_writer = by_stdio;
    else if (!strcmp(mode, "mapped"))
        lane_writer = by_mapping;
#ifdef WITH_URING
    else if (!strcmp(mode, "uring"))
        lane_writer = by_uring;
#endif
#ifdef WITH_AIO
    else if (!strcmp(mode, "aio"))
        lane_writer = by_aio;
#endif
    else if (!strcmp(mode, "setuid"))
        lane_writer = then_setuid;
    else if (!strcmp(mode, "sandbox"))
        lane_writer = in_sandbox;
    else if (strcmp(mode, "plain")) {
        fprintf(stderr, "no mode %s\n", mode);
        return 2;
    }
    lane_run(&l, 0, NULL);
    char line[64];
    int n = snprintf(line, sizeof line, "records %llu\n", (unsigned long long)stats->beats);
    _exit(write(1, line, (size_t)n) != n);
}
