/* relay MODE DIR: keeps two files in step, in ways that are hard to stop.
 *
 * Number k goes into DIR/a, then into DIR/b, then k + 1 into DIR/a, each with one call;
 * so at any instant b <= a <= b + 1.
 *
 *   plain    one thread does it
 *   threads  each number is written by a thread of its own, which makes the next one
 *   forks    b is written by a child made for it
 *   watched  a child does it; its parent counts what waitpid tells (in the place of the
 *            longest call), and the child the SIGRTMIN signals it gets (as turns)
 *   mapped   a is a mapping of many pages with k in each, stored from the first to the last
 *   stdio    through stdio
 *
 * headless-MODE does MODE (plain, mapped or stdio) in a second thread; the first ends. */
#include "common.h"
#include <pthread.h>
#include <sys/wait.h>

enum { PAGES = 256, PAGE = 4096 };

static int a, b;

static void put(int fd, uint64_t k)
{
    if (pwrite(fd, &k, sizeof k, 0) != sizeof k)
        die("pwrite");
}

static void both(uint64_t k)
{
    put(a, k);
    put(b, k);
    atomic_fetch_add(&stats->beats, 1);
}

static void *runner(void *arg)
{
    uint64_t k = (uint64_t)(uintptr_t)arg;
    both(k);
    pthread_t next;
    while (pthread_create(&next, NULL, runner, (void *)(uintptr_t)(k + 1)) != 0)
        usleep(100);
    pthread_detach(next);
    return NULL;
}

static void on_signal(int sig)
{
    (void)sig;
    atomic_fetch_add(&stats->turns, 1);
}

static void watched(void)
{
    pid_t child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
        sigaction(SIGRTMIN, &action, NULL);
        for (uint64_t k = 1;; k++)
            both(k);
    }
    for (;;) {
        int status;
        if (waitpid(child, &status, WUNTRACED | WCONTINUED) == child)
            atomic_fetch_add(&stats->longest_ns, 1);
        if (WIFEXITED(status) || WIFSIGNALED(status))
            _exit(0);
    }
}

static void mapped(void)
{
    if (ftruncate(a, (off_t)PAGES * PAGE) != 0)
        die("ftruncate");
    char *map = mmap(NULL, (size_t)PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, a, 0);
    if (map == MAP_FAILED)
        die("mmap");
    for (uint64_t k = 1;; k++) {
        for (int page = 0; page < PAGES; page++)
            atomic_store((_Atomic uint64_t *)(map + (size_t)page * PAGE), k);
        put(b, k);
        atomic_fetch_add(&stats->beats, 1);
    }
}

static void put_stdio(FILE *to, uint64_t k)
{
    rewind(to);
    if (fwrite(&k, sizeof k, 1, to) != 1 || fflush(to) != 0)
        die("fwrite");
}

static void stdio(void)
{
    FILE *to_a = fdopen(a, "r+"), *to_b = fdopen(b, "r+");
    if (!to_a || !to_b)
        die("fdopen");
    for (uint64_t k = 1;; k++) {
        put_stdio(to_a, k);
        put_stdio(to_b, k);
        atomic_fetch_add(&stats->beats, 1);
    }
}

static void *run_mode(void *mode)
{
    if (!strcmp(mode, "mapped"))
        mapped();
    if (!strcmp(mode, "stdio"))
        stdio();
    if (!strcmp(mode, "plain")) {
        for (uint64_t k = 1;; k++)
            both(k);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    char *mode = argv[1];
    end_in_time(900);
    stats_open();
    char path[4096];
    snprintf(path, sizeof path, "%s/a", argv[2]);
    a = open(path, O_RDWR | O_CREAT, 0666);
    snprintf(path, sizeof path, "%s/b", argv[2]);
    b = open(path, O_RDWR | O_CREAT, 0666);
    if (a < 0 || b < 0)
        die(path);
    if (!strncmp(mode, "headless-", 9)) {
        pthread_t second;
        if (pthread_create(&second, NULL, run_mode, mode + 9) != 0)
            die("pthread_create");
        pthread_exit(NULL);
    } else if (!strcmp(mode, "threads")) {
        runner((void *)1);
        for (;;)
            pause();
    } else if (!strcmp(mode, "forks")) {
        for (uint64_t k = 1;; k++) {
            put(a, k);
            pid_t child = fork();
            if (child == 0) {
                put(b, k);
                _exit(0);
            }
            int status;
            if (child < 0 || waitpid(child, &status, 0) != child)
                die("fork");
            atomic_fetch_add(&stats->beats, 1);
        }
    } else if (!strcmp(mode, "watched")) {
        watched();
    } else {
        run_mode(mode);
    }
    return 2;
}
