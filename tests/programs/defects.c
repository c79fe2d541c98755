/* defects MODE DIR
 *
 * Writes ordered records (lanes.h) in ways that once went wrong; see
 * tests/regressions.rs, which knows how many files and lanes each mode has.
 * Ends when it is told to. */
#include "lanes.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static struct lanes l = {.files = 2, .lanes = 1, .record = 4096, .pace_us = 50};

/* toggled: by stores into mappings that are writable only meanwhile. */
static ssize_t by_toggled_mapping(int file, int fd, const void *record, size_t n, off_t at)
{
    static char *maps[16];
    (void)fd;
    for (int f = 0; f < 16 && !maps[f]; f++) {
        int own = lanes_open_one(&l, f, 0);
        maps[f] = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_SHARED, own, 0);
        if (maps[f] == MAP_FAILED)
            die("mmap");
        close(own);
    }
    if (mprotect(maps[file], n, PROT_READ | PROT_WRITE) != 0)
        die("mprotect");
    memcpy(maps[file] + at, record, n);
    if (mprotect(maps[file], n, PROT_READ) != 0)
        die("mprotect");
    return (ssize_t)n;
}

/* A child of vfork writes to a pipe: the first call of this program that the gate
 * counts. With `exec` it fails to become another program first. */
static void first_call_by_vfork(int exec)
{
    int ends[2], status;
    char byte;
    if (pipe(ends) != 0)
        die("pipe");
    pid_t child = vfork();
    if (child == 0) {
        if (exec)
            execl("/nonexistent/program", "program", (char *)NULL);
        _exit(write(ends[1], "x", 1) != 1);
    }
    if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
        die("vfork");
    if (read(ends[0], &byte, 1) != 1)
        die("read");
    close(ends[0]);
    close(ends[1]);
}

static void *lane(void *arg)
{
    lane_run(&l, (int)(intptr_t)arg, NULL);
    return NULL;
}

static void in_threads(int count, void *(*body)(void *))
{
    pthread_t threads[8];
    for (int i = 0; i < count; i++)
        if (pthread_create(&threads[i], NULL, body, (void *)(intptr_t)i) != 0)
            die("pthread_create");
    for (int i = 0; i < count; i++)
        pthread_join(threads[i], NULL);
}

/* A call that does not end: more than a pipe takes. */
static void *blocked(void *arg)
{
    static char much[1 << 20];
    int ends[2];
    (void)arg;
    if (pipe(ends) != 0 || write(ends[1], much, sizeof much) != sizeof much)
        die("write");
    return NULL;
}

/* Asks whether there is seccomp, as sandboxing libraries do. */
static void probe(void)
{
    errno = 0;
    int a = prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, NULL);
    int first = errno;
    errno = 0;
    long b = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, NULL);
    printf("prctl %d %d, seccomp %ld %d\n", a, first, b, errno);
    fflush(stdout);
}

static void enter_sandbox(void)
{
    static const unsigned allowed[] = {
        SYS_read,         SYS_write,     SYS_pwrite64,        SYS_exit_group,
        SYS_rt_sigreturn, SYS_nanosleep, SYS_clock_nanosleep,
    };
    enum { COUNT = sizeof allowed / sizeof *allowed };
    struct sock_filter code[2 * COUNT + 2];
    unsigned short n = 0;
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
                                             offsetof(struct seccomp_data, nr));
    for (int i = 0; i < COUNT; i++) {
        code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, allowed[i], 0, 1);
        code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    }
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
    struct sock_fprog program = {.len = n, .filter = code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
        die("seccomp");
}

/* Back in lane_run, the next call would be close. */
static void end_now(int sig)
{
    (void)sig;
    _exit(0);
}

/* sandbox: from record 200 on, any call but the few it needs kills it. */
static ssize_t in_sandbox(int file, int fd, const void *record, size_t n, off_t at)
{
    static long records;
    if (file == 0 && ++records == 200) {
        enter_sandbox();
        atomic_fetch_add(&stats->turns, 1);
    }
    return pwrite(fd, record, n, at);
}

/* Process `lane` of a pid namespace of its own, without an exec. */
static pid_t in_namespace(int lane)
{
    pid_t between = fork();
    if (between != 0)
        return between;
    end_in_time(600);
    if (unshare(CLONE_NEWPID) != 0)
        die("unshare");
    pid_t first = fork();
    if (first == 0) {
        end_in_time(600);
        lane_run(&l, lane, NULL);
        _exit(0);
    }
    int status = 1;
    waitpid(first, &status, 0);
    _exit(status != 0);
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    const char *mode = argv[1];
    l.dir = argv[2];
    end_in_time(600);
    if (!strncmp(mode, "vfork", 5))
        first_call_by_vfork(strstr(mode, "exec") != NULL);
    if (!strcmp(mode, "vfork-blocked")) {
        pthread_t other;
        if (pthread_create(&other, NULL, blocked, NULL) != 0)
            die("pthread_create");
        usleep(20000);
        blocked(NULL);
    }
    stats_open();
    if (!strcmp(mode, "toggled")) {
        l.files = 16;
        lane_writer = by_toggled_mapping;
    } else if (!strcmp(mode, "sandbox")) {
        lane_writer = in_sandbox;
    } else if (!strcmp(mode, "namespaces") || !strcmp(mode, "probe")) {
        l.lanes = 2;
    } else if (strncmp(mode, "vfork", 5)) {
        fprintf(stderr, "no mode %s\n", mode);
        return 2;
    }
    lanes_create(&l);
    struct sigaction term = {.sa_handler = lanes_on_term, .sa_flags = SA_RESTART};
    if (lane_writer == in_sandbox)
        term.sa_handler = end_now;
    sigaction(SIGTERM, &term, NULL);
    if (!strcmp(mode, "namespaces")) {
        pid_t one = in_namespace(0), other = in_namespace(1);
        int a = 1, b = 1;
        waitpid(one, &a, 0);
        waitpid(other, &b, 0);
        return a != 0 || b != 0;
    }
    if (!strcmp(mode, "probe")) {
        probe();
        in_threads(2, lane);
        return 0;
    }
    lane_run(&l, 0, NULL);
    return 0;
}
