/* stubborn MODE DIR SECONDS
 *
 * Writes ordered records (lanes.h: 2 files, 1 lane, 4 KiB) and beside that does
 * one thing that a gate could trip over, until SIGTERM or for SECONDS. */
#include "lanes.h"
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <spawn.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>

static struct lanes l = {.files = 2, .lanes = 1, .record = 4096, .pace_us = 50};
static char path[4096];
extern char **environ;

static const char *in_dir(const char *name)
{
    snprintf(path, sizeof path, "%s/%s", l.dir, name);
    return path;
}

static int open_file(const char *name)
{
    int fd = open(in_dir(name), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0)
        die(name);
    return fd;
}

static int stopping(void)
{
    return atomic_load(&stats->stop) != 0;
}

static void turn(void)
{
    atomic_fetch_add(&stats->turns, 1);
}

static void start(void *(*body)(void *))
{
    pthread_t id;
    if (pthread_create(&id, NULL, body, NULL))
        die("pthread_create");
    pthread_detach(id);
}

/* A child that runs `body` and ends with us. */
static pid_t child(void (*body)(void))
{
    pid_t pid = fork();
    if (pid < 0)
        die("fork");
    if (pid == 0) {
        end_in_time(0);
        body();
        _exit(0);
    }
    return pid;
}

/* Timed pwrite of a block that nobody checks. */
static void scribble(int fd)
{
    char block[4096];
    memset(block, 'x', sizeof block);
    uint64_t began = now_ns();
    if (pwrite(fd, block, sizeof block, 0) != sizeof block)
        die("scribble");
    stats_took(now_ns() - began);
}

/* pipe: a thread in write() to a full pipe, for ever. */
static void *blocked_on_pipe(void *unused)
{
    static char block[1 << 20];
    int fds[2];
    (void)unused;
    if (pipe(fds) != 0)
        die("pipe");
    turn();
    if (write(fds[1], block, sizeof block) != 0)
        die("the pipe took it all");
    return NULL;
}

/* fifo: a thread in open() of a FIFO nobody reads, with O_CREAT and O_TRUNC. */
static void *blocked_on_fifo(void *unused)
{
    char name[4096];
    (void)unused;
    snprintf(name, sizeof name, "%s/fifo", l.dir);
    if (mkfifo(name, 0644) != 0 && errno != EEXIST)
        die("mkfifo");
    turn();
    if (open(name, O_WRONLY | O_CREAT | O_TRUNC, 0644) >= 0)
        die("the FIFO opened");
    return NULL;
}

/* setlkw: one process never gives up byte 0; another waits for it for ever; two
 * take byte 1 in turn and write under it. */
static void lock(int fd, short type, off_t byte)
{
    struct flock range = {.l_type = type, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
    if (fcntl(fd, F_SETLKW, &range) != 0)
        die("F_SETLKW");
}

static void holds_for_ever(void)
{
    lock(open_file("locked"), F_WRLCK, 0);
    for (;;)
        pause();
}

static void waits_for_ever(void)
{
    int fd = open_file("locked");
    usleep(100000);
    turn();
    lock(fd, F_WRLCK, 0);
    die("the lock was granted");
}

static void takes_turns(void)
{
    int fd = open_file("locked");
    while (!stopping()) {
        lock(fd, F_WRLCK, 1);
        scribble(fd);
        lock(fd, F_UNLCK, 1);
        turn();
    }
}

/* longjmp: a timer's handler leaves write() by siglongjmp, over and over. */
static sigjmp_buf back;
static volatile sig_atomic_t jumping;
static _Thread_local int is_jumper;

static void jump(int sig)
{
    (void)sig;
    if (is_jumper && jumping)
        siglongjmp(back, 1);
}

static void *jumps_out_of_write(void *unused)
{
    static char block[1 << 18];
    int fd = open_file("jumped");
    (void)unused;
    sigset_t alarm_only;
    sigemptyset(&alarm_only);
    sigaddset(&alarm_only, SIGUSR1);
    struct sigaction act = {.sa_handler = jump};
    sigaction(SIGUSR1, &act, NULL);
    is_jumper = 1;
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGUSR1};
    event._sigev_un._tid = (pid_t)syscall(SYS_gettid);
    timer_t timer;
    if (timer_create(CLOCK_MONOTONIC, &event, &timer) != 0)
        die("timer_create");
    struct itimerspec every = {{0, 1300000}, {0, 1300000}};
    timer_settime(timer, 0, &every, NULL);
    pthread_sigmask(SIG_UNBLOCK, &alarm_only, NULL);
    while (!stopping()) {
        if (sigsetjmp(back, 1) == 0) {
            jumping = 1;
            for (;;)
                if (pwrite(fd, block, sizeof block, 0) < 0 && errno != EINTR)
                    die("pwrite");
        }
        jumping = 0;
        turn();
    }
    return NULL;
}

/* cancel: threads are cancelled while they write. */
static void *writes_until_cancelled(void *fd)
{
    static char block[1 << 16];
    for (;;)
        if (pwrite((int)(intptr_t)fd, block, sizeof block, 0) < 0)
            die("pwrite");
    return NULL;
}

static void *cancels(void *unused)
{
    int fd = open_file("cancelled");
    (void)unused;
    while (!stopping()) {
        pthread_t id;
        if (pthread_create(&id, NULL, writes_until_cancelled, (void *)(intptr_t)fd))
            die("pthread_create");
        usleep(300);
        pthread_cancel(id);
        pthread_join(id, NULL);
        turn();
    }
    return NULL;
}

/* exec: a process that writes with one thread and executes itself from another. */
static void *executes_itself(void *unused)
{
    (void)unused;
    usleep(3000);
    char *argv[] = {"stubborn", "exec-again", (char *)l.dir, "0", NULL};
    execv("/proc/self/exe", argv);
    die("execv");
    return NULL;
}

static void writes_and_executes(void)
{
    int fd = open_file("executed");
    turn();
    start(executes_itself);
    while (!stopping())
        scribble(fd);
    _exit(0);
}

/* fork-in-handler: a timer's handler forks, in the thread that writes records. */
static int forked_fd;

static void forks(int sig)
{
    (void)sig;
    int saved = errno;
    pid_t pid = fork();
    if (pid == 0) {
        if (pwrite(forked_fd, "child", 5, 0) != 5)
            _exit(1);
        _exit(0);
    }
    turn();
    errno = saved;
}

/* vfork, spawn: programs are started all the time; the children write. */
static void *vforks(void *unused)
{
    (void)unused;
    while (!stopping()) {
        pid_t pid = vfork();
        if (pid == 0) {
            execl("/bin/true", "true", (char *)NULL);
            _exit(127);
        }
        waitpid(pid, NULL, 0);
        turn();
    }
    return NULL;
}

static void *spawns(void *unused)
{
    char command[8192];
    (void)unused;
    snprintf(command, sizeof command, "echo spawned > '%s/spawned'", l.dir);
    char *argv[] = {"sh", "-c", command, NULL};
    while (!stopping()) {
        pid_t pid;
        if (posix_spawn(&pid, "/bin/sh", NULL, NULL, argv, environ) != 0)
            die("posix_spawn");
        waitpid(pid, NULL, 0);
        turn();
    }
    return NULL;
}

/* clone: threads that libc knows nothing of, with their creator's thread pointer. */
static int raw_thread(void *fd)
{
    char block[512] = {0};
    for (int i = 0; i < 20; i++)
        if (pwrite((int)(intptr_t)fd, block, sizeof block, 0) < 0)
            break;
    syscall(SYS_exit, 0);
    return 0;
}

static void *clones(void *unused)
{
    (void)unused;
    int fd = open_file("cloned");
    char *stack = mmap(NULL, 1 << 16, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    static pid_t tid;
    while (!stopping()) {
        tid = 1;
        if (clone(raw_thread, stack + (1 << 16),
                  CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM |
                      CLONE_CHILD_CLEARTID,
                  (void *)(intptr_t)fd, NULL, NULL, &tid) < 0)
            die("clone");
        while (*(volatile pid_t *)&tid != 0)
            usleep(100);
        turn();
    }
    return NULL;
}

/* churn: threads that live for one write. */
static void *one_write(void *fd)
{
    scribble((int)(intptr_t)fd);
    return NULL;
}

static void *churns(void *unused)
{
    int fd = open_file("churned");
    (void)unused;
    while (!stopping()) {
        pthread_t id[8];
        for (int i = 0; i < 8; i++)
            if (pthread_create(&id[i], NULL, one_write, (void *)(intptr_t)fd))
                die("pthread_create");
        for (int i = 0; i < 8; i++) {
            pthread_join(id[i], NULL);
            turn();
        }
    }
    return NULL;
}

/* sibling: a second process that writes records of its own, for the test to
 * stop or kill. */
static void writes_alone(void)
{
    int fd = open_file("alone");
    while (!stopping()) {
        scribble(fd);
        turn();
    }
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    const char *mode = argv[1];
    l.dir = argv[2];
    unsigned seconds = (unsigned)number(argv[3]);
    stats_open();
    if (!strcmp(mode, "exec-again")) {
        end_in_time(0);
        writes_and_executes();
    }
    lanes_create(&l);
    struct sigaction term = {.sa_handler = lanes_on_term, .sa_flags = SA_RESTART};
    sigaction(SIGTERM, &term, NULL);
    sigset_t mine;
    sigemptyset(&mine);
    sigaddset(&mine, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &mine, NULL);
    end_in_time(seconds);

    if (!strcmp(mode, "plain")) {
    } else if (!strcmp(mode, "pipe")) {
        start(blocked_on_pipe);
    } else if (!strcmp(mode, "fifo")) {
        start(blocked_on_fifo);
    } else if (!strcmp(mode, "setlkw")) {
        child(holds_for_ever);
        child(waits_for_ever);
        child(takes_turns);
        child(takes_turns);
    } else if (!strcmp(mode, "longjmp")) {
        start(jumps_out_of_write);
    } else if (!strcmp(mode, "cancel")) {
        start(cancels);
    } else if (!strcmp(mode, "exec")) {
        child(writes_and_executes);
    } else if (!strcmp(mode, "fork-in-handler")) {
        forked_fd = open_file("forked");
        signal(SIGCHLD, SIG_IGN);
        struct sigaction act = {.sa_handler = forks, .sa_flags = SA_RESTART};
        sigaction(SIGALRM, &act, NULL);
        struct itimerval every = {{0, 5000}, {0, 5000}};
        setitimer(ITIMER_REAL, &every, NULL);
    } else if (!strcmp(mode, "vfork")) {
        start(vforks);
    } else if (!strcmp(mode, "spawn")) {
        start(spawns);
    } else if (!strcmp(mode, "clone")) {
        start(clones);
    } else if (!strcmp(mode, "churn")) {
        start(churns);
    } else if (!strcmp(mode, "sibling")) {
        child(writes_alone);
    } else {
        fprintf(stderr, "no mode %s\n", mode);
        return 2;
    }
    lane_run(&l, 0, NULL);
    printf("records %llu turns %llu longest_us %llu\n", (unsigned long long)stats->beats,
           (unsigned long long)stats->turns, (unsigned long long)(stats->longest_ns / 1000));
    fflush(stdout);
    _exit(0);
}
