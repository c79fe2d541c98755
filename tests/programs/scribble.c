/* scribble run DIR SEED THREADS PROCESSES BIG_KIB PACE_US SECONDS [TROUBLE]
 * scribble replay DIR SEED LANE BIG_KIB
 *
 * Changes files in every way there is. What operation n of a lane does follows from the
 * seed, the lane and n, and each is one system call that changes something; so the state
 * after n operations can be made again, elsewhere, and compared byte by byte.
 *
 * run: THREADS threads of PROCESSES processes, a lane each, in DIR/lane-K. After each operation
 * the lane writes to DIR/lane-K/head how many it has made, and how many the next lane had made
 * as it saw it. Until SIGTERM, or for SECONDS. With TROUBLE, one thing that is difficult for who
 * holds it is done beside that, to DIR/trouble: whole blocks of 4 KiB, each of one number.
 *
 * replay: reads numbers, and goes on in DIR until that many operations are made; says so.
 */
#include "common.h"
#include <linux/falloc.h>
#include <linux/filter.h>
#include <linux/fs.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <setjmp.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <sys/xattr.h>

#ifndef RWF_APPEND
#define RWF_APPEND 0x10
#endif

enum { SMALL = 3, MOST = 200 << 10, LANES = 64 };

struct lane {
    char dir[512];
    uint64_t seed, random;
    size_t size; /* of the large file at first */
    int big, log, pipe[2];
    unsigned char *bytes;
};

static _Atomic uint64_t *made; /* by lane; shared by all processes */
static _Atomic int over;

static uint64_t next(struct lane *l)
{
    uint64_t z = l->random += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static uint64_t below(struct lane *l, uint64_t bound)
{
    return bound ? next(l) % bound : 0;
}

static const char *in(struct lane *l, const char *name)
{
    static _Thread_local char paths[4][600];
    static _Thread_local int turn;
    char *path = paths[turn++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", l->dir, name);
    return path;
}

static const char *small(struct lane *l, uint64_t index)
{
    static _Thread_local char names[2][16];
    static _Thread_local int turn;
    char *name = names[turn++ % 2];
    snprintf(name, sizeof names[0], "small-%u", (unsigned)index);
    return in(l, name);
}

static size_t fill(struct lane *l, size_t len)
{
    for (size_t at = 0; at < len; at += 8) {
        uint64_t word = next(l);
        memcpy(l->bytes + at, &word, 8);
    }
    return len;
}

/* Mostly short, sometimes over several chunks. */
static size_t some(struct lane *l)
{
    return 1 + (below(l, 24) ? below(l, 4000) : below(l, MOST - 8));
}

static off_t size_of(int fd)
{
    struct stat s;
    return fstat(fd, &s) ? 0 : s.st_size;
}

static int exists(const char *path)
{
    struct stat s;
    return lstat(path, &s) == 0;
}

/* Does as much as the file system will; what it refuses, it refuses in the replay, too. */
#define TRY(call) do { if ((call) < 0) { /* refused */ } } while (0)

static void make_fd(const char *path, int flags, mode_t mode)
{
    int fd = open(path, flags | O_CLOEXEC, mode);
    if (fd >= 0)
        close(fd);
}

static void operation(struct lane *l, uint64_t n)
{
    l->random = l->seed ^ (n * 0xd1342543de82ef95u);
    off_t size = size_of(l->big), at = (off_t)below(l, (uint64_t)size + 1);
    size_t len = some(l);
    const char *path = small(l, below(l, SMALL));
    switch (below(l, 48)) {
    default:
        TRY(pwrite(l->big, l->bytes, fill(l, len), at));
        break;
    case 1: case 2: case 3: case 4:
        lseek(l->big, at, SEEK_SET);
        TRY(write(l->big, l->bytes, fill(l, len)));
        break;
    case 5: case 6: {
        fill(l, len);
        struct iovec parts[3] = {{l->bytes, len / 3}, {NULL, 0}, {l->bytes + len / 3, len - len / 3}};
        switch (below(l, 4)) {
        case 0:
            lseek(l->big, at, SEEK_SET);
            TRY(writev(l->big, parts, 3));
            break;
        case 1:
            TRY(pwritev(l->big, parts, 3, at));
            break;
        case 2:
            TRY(pwritev2(l->big, parts, 3, at, 0));
            break;
        case 3:
            lseek(l->big, at, SEEK_SET);
            TRY(pwritev2(l->big, parts, 3, -1, 0));
            break;
        }
        break;
    }
    case 7:
        TRY(write(l->log, l->bytes, fill(l, len)));
        break;
    case 8: {
        struct iovec part = {l->bytes, fill(l, len)};
        TRY(pwritev2(l->big, &part, 1, 0, below(l, 2) && size < (off_t)(2 * l->size) ? RWF_APPEND : 0));
        break;
    }
    case 9: /* which appends, on Linux */
        TRY(pwrite(l->log, l->bytes, fill(l, len), (off_t)below(l, 1000)));
        break;
    case 10: {
        off_t to = (off_t)(l->size / 2 + below(l, l->size));
        TRY(ftruncate(l->big, below(l, 4) ? to : size - (off_t)below(l, (uint64_t)size / 64 + 1)));
        break;
    }
    case 11:
        TRY(truncate(path, (off_t)below(l, 100000)));
        break;
    case 12:
        if (size_of(l->log) > 1 << 20)
            TRY(ftruncate(l->log, (off_t)below(l, 4096)));
        else
            TRY(truncate(in(l, "log"), size_of(l->log) / 2));
        break;
    case 13:
        TRY(fallocate(l->big, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, (off_t)len));
        break;
    case 14:
        TRY(fallocate(l->big, FALLOC_FL_ZERO_RANGE | (below(l, 2) ? FALLOC_FL_KEEP_SIZE : 0), at, (off_t)len));
        break;
    case 15:
        at &= ~4095;
        if (size > (off_t)l->size)
            TRY(fallocate(l->big, FALLOC_FL_COLLAPSE_RANGE, at, 16384));
        else
            TRY(fallocate(l->big, FALLOC_FL_INSERT_RANGE, at, 16384));
        break;
    case 16: case 17:
        make_fd(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
        break;
    case 18: /* by another name */
        if (!exists(in(l, "symlink")))
            TRY(symlink(strrchr(path, '/') + 1, in(l, "symlink")));
        else if (below(l, 3))
            make_fd(in(l, "symlink"), O_RDWR | O_TRUNC, 0);
        else
            TRY(unlink(in(l, "symlink")));
        break;
    case 19:
        if (!exists(in(l, "hardlink")))
            TRY(link(path, in(l, "hardlink")));
        else if (below(l, 3))
            make_fd(in(l, "hardlink"), O_WRONLY | O_TRUNC, 0);
        else
            TRY(unlink(in(l, "hardlink")));
        break;
    case 20: case 21: case 22: case 23: { /* to another file, and over the old one */
        const char *temporary = in(l, "temporary");
        int fd = open(temporary, O_WRONLY | O_CLOEXEC);
        if (fd < 0)
            make_fd(temporary, O_WRONLY | O_CREAT | O_EXCL, 0600);
        else if (size_of(fd) == 0)
            TRY(write(fd, l->bytes, fill(l, len)));
        else
            TRY(rename(temporary, path));
        if (fd >= 0)
            close(fd);
        break;
    }
    case 24: case 25: { /* away, made, and written */
        int fd = open(path, O_WRONLY | O_CLOEXEC);
        if (fd < 0)
            make_fd(path, O_WRONLY | O_CREAT, 0640);
        else if (size_of(fd) < 4096)
            TRY(pwrite(fd, l->bytes, fill(l, len), (off_t)below(l, 5000)));
        else
            TRY(unlink(path));
        if (fd >= 0)
            close(fd);
        break;
    }
    case 26:
        TRY(rename(path, small(l, below(l, SMALL))));
        break;
    case 27: { /* not onto itself, as far as possible */
        off_t from = (off_t)below(l, (uint64_t)size / 2 + 1), to = size / 2 + (off_t)below(l, (uint64_t)size / 2 + 1);
        if (below(l, 2)) {
            TRY(copy_file_range(l->big, &from, l->big, &to, len, 0));
        } else {
            lseek(l->big, to, SEEK_SET);
            int fd = open(path, O_RDONLY | O_CLOEXEC);
            from = 0;
            if (fd >= 0) {
                TRY(copy_file_range(fd, &from, l->big, NULL, 4096, 0));
                close(fd);
            }
        }
        break;
    }
    case 28: {
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        off_t from = 0;
        lseek(l->big, at, SEEK_SET);
        if (fd >= 0) {
            TRY(sendfile(l->big, fd, &from, 4096));
            close(fd);
        }
        break;
    }
    case 29: {
        len = 1 + len % 4096;
        TRY(write(l->pipe[1], l->bytes, fill(l, len)));
        if (below(l, 2)) {
            TRY(splice(l->pipe[0], NULL, l->big, &at, len, 0));
        } else {
            lseek(l->big, at, SEEK_SET);
            TRY(splice(l->pipe[0], NULL, l->big, NULL, len, 0));
        }
        break;
    }
    case 30: {
        struct file_clone_range range = {
            .src_fd = l->big,
            .src_offset = below(l, (uint64_t)size / 2 + 1) & ~65535ull,
            .src_length = 65536,
            .dest_offset = ((uint64_t)size / 2 + 65536 + below(l, (uint64_t)size / 2 + 1)) & ~65535ull,
        };
        TRY(ioctl(l->big, FICLONERANGE, &range));
        break;
    }
    case 31:
        if (below(l, 2))
            TRY(fchmod(l->big, 0600 | (mode_t)below(l, 0100)));
        else
            TRY(chmod(path, 0600 | (mode_t)below(l, 0100)));
        break;
    case 32: {
        struct timespec times[2] = {{0, UTIME_OMIT}, {(time_t)below(l, 1u << 30), 0}};
        TRY(utimensat(AT_FDCWD, below(l, 2) ? path : in(l, "big"), times, 0));
        break;
    }
    case 33: {
        uint64_t value = next(l);
        if (below(l, 2))
            TRY(fsetxattr(l->big, "user.scribble", &value, 8, 0));
        else
            TRY(setxattr(path, "user.scribble", &value, 8, 0));
        break;
    }
    case 34:
        if (mkdir(in(l, "sub"), 0750) != 0)
            TRY(below(l, 2) ? rmdir(in(l, "sub")) : rename(path, in(l, "sub/small")));
        break;
    case 35:
        if (exists(in(l, "sub/small")))
            TRY(below(l, 2) ? rename(in(l, "sub/small"), path) : truncate(in(l, "sub/small"), 7));
        break;
    }
}

static void begin(struct lane *l, const char *dir, uint64_t seed, int number, size_t size)
{
    snprintf(l->dir, sizeof l->dir, "%s", dir);
    l->seed = l->random = seed * 0x2545f4914f6cdd1du + (uint64_t)number;
    l->size = size;
    l->bytes = malloc(MOST + 8);
    umask(022);
    if (!l->bytes || (mkdir(dir, 0755) && errno != EEXIST))
        die(dir);
    l->big = open(in(l, "big"), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    l->log = open(in(l, "log"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (l->big < 0 || l->log < 0 || pipe2(l->pipe, O_CLOEXEC))
        die(dir);
    for (size_t at = 0; at < size; at += MOST) {
        size_t len = size - at < MOST ? size - at : MOST;
        if (pwrite(l->big, l->bytes, fill(l, len), (off_t)at) != (ssize_t)len)
            die("pwrite");
    }
    for (int i = 0; i < SMALL; i++) {
        int fd = open(small(l, (uint64_t)i), O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
        if (fd < 0 || write(fd, l->bytes, fill(l, 30000)) != 30000)
            die("write");
        close(fd);
    }
}

static struct lane lanes[LANES];
static int threads, processes;
static long pace_us;

static void *work(void *argument)
{
    int number = (int)(intptr_t)argument, other = (number + 1) % (threads * processes);
    struct lane *l = &lanes[number];
    int head = open(in(l, "head"), O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    if (head < 0)
        die("head");
    for (uint64_t n = 1; !over && !stats->stop; n++) {
        uint64_t start = now_ns();
        operation(l, n);
        uint64_t words[2] = {n, made[other]};
        if (pwrite(head, words, sizeof words, 0) != sizeof words)
            die("head");
        stats_took(now_ns() - start);
        made[number] = n;
        stats->beats++;
        if (pace_us)
            usleep((useconds_t)pace_us);
    }
    return NULL;
}

enum { BLOCK = 4096, BLOCKS = 8192 };
static int trouble_fd = -1;
static char *self, *dir_of_all;

/* May be called anywhere. */
static void write_block(void)
{
    uint64_t block[BLOCK / 8], value = now_ns() * 0x9e3779b97f4a7c15u;
    for (size_t i = 0; i < BLOCK / 8; i++)
        block[i] = value;
    if (pwrite(trouble_fd, block, BLOCK, (off_t)((value >> 32) % BLOCKS * BLOCK)) != BLOCK)
        _exit(9);
}

static void on_alarm(int signal)
{
    (void)signal;
    int kept = errno;
    write_block();
    errno = kept;
}

static sigjmp_buf back;

static void jump(int signal)
{
    (void)signal;
    siglongjmp(back, 1);
}

static void tick(void (*handler)(int), suseconds_t us)
{
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
    struct itimerval timer = {{0, us}, {0, us}};
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &timer, NULL);
}

/* Writes by its position, and is torn out of that again and again. */
static void jumps(void)
{
    static volatile int left = 300;
    uint64_t block[BLOCK / 8];
    if (sigsetjmp(back, 1) == 0)
        tick(jump, 700);
    while (left-- > 0) {
        uint64_t value = now_ns() * 0x9e3779b97f4a7c15u;
        for (size_t i = 0; i < BLOCK / 8; i++)
            block[i] = value;
        lseek(trouble_fd, (off_t)((value >> 32) % BLOCKS * BLOCK), SEEK_SET);
        if (write(trouble_fd, block, BLOCK) != BLOCK)
            _exit(9);
    }
    struct itimerval none = {{0, 0}, {0, 0}};
    setitimer(ITIMER_REAL, &none, NULL);
}

/* From here on, any call but these kills it. */
static void enter_sandbox(void)
{
#define ALLOW(number) \
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        ALLOW(SYS_pwrite64), ALLOW(SYS_exit_group), ALLOW(SYS_exit),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        _exit(8);
}

static void *writes_blocks(void *unused)
{
    for (;;) {
        write_block();
        pthread_testcancel();
    }
    return unused;
}

static void end_child(pid_t pid, int may_be_killed)
{
    int status;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return; /* the first thread has waited for it, at the end */
    if (!(WIFEXITED(status) && WEXITSTATUS(status) == 0) && !may_be_killed) {
        fprintf(stderr, "a child ended with status %x\n", status);
        _exit(7);
    }
}

static void *trouble(void *argument)
{
    const char *mode = argument;
    for (unsigned turn = 0; !over && !stats->stop; turn++) {
        pid_t pid;
        if (strcmp(mode, "vfork") == 0) {
            pid = vfork();
            if (pid == 0) {
                write_block();
                execl(self, self, "block", dir_of_all, NULL);
                _exit(6);
            }
            end_child(pid, 0);
        } else if (strcmp(mode, "cancel") == 0) {
            pthread_t id;
            if (pthread_create(&id, NULL, writes_blocks, NULL))
                die("pthread_create");
            usleep(turn * 997 % 5000);
            pthread_cancel(id);
            pthread_join(id, NULL);
        } else {
            pid = fork();
            if (pid < 0)
                die("fork");
            if (pid == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                if (strcmp(mode, "killed") == 0)
                    writes_blocks(NULL);
                if (strcmp(mode, "sandbox") == 0)
                    enter_sandbox();
                if (strcmp(mode, "longjmp") == 0)
                    jumps();
                for (int i = 0; i < 100; i++)
                    write_block();
                if (strcmp(mode, "exec") == 0)
                    execl(self, self, "block", dir_of_all, NULL);
                _exit(0);
            }
            if (strcmp(mode, "killed") == 0) {
                usleep(turn * 997 % 5000);
                kill(pid, SIGKILL);
            }
            end_child(pid, strcmp(mode, "killed") == 0);
        }
        atomic_fetch_add(&stats->turns, 1);
        usleep(200);
    }
    return NULL;
}

static void open_trouble(const char *dir)
{
    char path[500];
    snprintf(path, sizeof path, "%s/trouble", dir);
    trouble_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (trouble_fd < 0)
        die(path);
    if (size_of(trouble_fd) == 0)
        for (int i = 0; i < BLOCKS; i++) {
            uint64_t block[BLOCK / 8] = {0};
            if (pwrite(trouble_fd, block, BLOCK, (off_t)i * BLOCK) != BLOCK)
                die(path);
        }
}

static void begin_trouble(char *mode)
{
    pthread_t id;
    if (strcmp(mode, "signal") == 0) {
        tick(on_alarm, 1500);
        return;
    }
    if (pthread_create(&id, NULL, trouble, mode))
        die("pthread_create");
    pthread_detach(id);
}

static void on_term(int signal)
{
    (void)signal;
    over = 1;
}

static void run_process(int process)
{
    pthread_t id[LANES];
    for (int t = 1; t < threads; t++)
        if (pthread_create(&id[t], NULL, work, (void *)(intptr_t)(process * threads + t)))
            die("pthread_create");
    work((void *)(intptr_t)(process * threads));
    for (int t = 1; t < threads; t++)
        pthread_join(id[t], NULL);
}

static int replay(char **argv)
{
    static struct lane l;
    begin(&l, argv[2], (uint64_t)number(argv[3]), (int)number(argv[4]), (size_t)number(argv[5]) << 10);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    unsigned long long to;
    for (uint64_t n = 0; scanf("%llu", &to) == 1;) {
        while (n < to)
            operation(&l, ++n);
        printf("%llu\n", (unsigned long long)n);
        fflush(stdout);
    }
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 6 && strcmp(argv[1], "replay") == 0)
        return replay(argv);
    if (argc == 3 && strcmp(argv[1], "block") == 0) {
        open_trouble(argv[2]);
        for (int i = 0; i < 20; i++)
            write_block();
        return 0;
    }
    if (argc < 9 || argc > 10 || strcmp(argv[1], "run") != 0) {
        fprintf(stderr, "usage: see the source\n");
        return 2;
    }
    threads = (int)number(argv[4]);
    processes = (int)number(argv[5]);
    pace_us = number(argv[7]);
    unsigned seconds = (unsigned)number(argv[8]);
    if (threads < 1 || processes < 1 || threads * processes > LANES)
        return 2;
    stats_open();
    made = mmap(NULL, LANES * sizeof *made, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED)
        die("mmap");
    for (int k = 0; k < threads * processes; k++) {
        char dir[400];
        snprintf(dir, sizeof dir, "%s/lane-%d", argv[2], k);
        size_t size = (size_t)number(argv[6]) << 10;
        /* One file is large. */
        begin(&lanes[k], dir, (uint64_t)number(argv[3]), k, k ? size / 8 : size);
    }
    struct sigaction term = {.sa_handler = on_term, .sa_flags = SA_RESTART};
    sigaction(SIGTERM, &term, NULL);
    sigaction(SIGALRM, &term, NULL);
    /* The alarm is the trouble's. */
    end_in_time(argc == 10 ? 0 : seconds);
    for (int p = 1; p < processes; p++) {
        pid_t pid = fork();
        if (pid < 0)
            die("fork");
        if (pid == 0) {
            end_in_time(seconds);
            run_process(p);
            return 0;
        }
    }
    if (argc == 10) {
        self = argv[0];
        dir_of_all = argv[2];
        open_trouble(argv[2]);
        begin_trouble(argv[9]);
    }
    run_process(0);
    stats->stop = 1;
    while (wait(NULL) > 0)
        ;
    return 0;
}
