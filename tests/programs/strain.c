/* strain NAME FILE
 *
 * Programs whose use of threads, signals and stacks is hard on whoever hooks their
 * calls. Each writes to FILE, always the same, and says what happened. */
#include "common.h"
#include <pthread.h>
#include <setjmp.h>
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ucontext.h>
#ifdef WITH_SECCOMP
#include <seccomp.h>
#endif

static const char *file;
static int fd;

static void must(int is_right, const char *what)
{
    if (!is_right)
        die(what);
}

static void record(long i)
{
    char text[33];
    snprintf(text, sizeof text, "%031ld\n", i);
    must(pwrite(fd, text, 32, i * 32) == 32, "pwrite");
}

static void rest(long us)
{
    struct timespec t = {us / 1000000, us % 1000000 * 1000};
    while (nanosleep(&t, &t) != 0)
        ;
}

/* --- cancellation --- */

static _Atomic long cleanups, started, cancelled;
static int full_pipe[2];

static void cleanup(void *unused)
{
    (void)unused;
    atomic_fetch_add(&cleanups, 1);
}

/* Blocked in write(). */
static void *blocked(void *asynchronous)
{
    if (asynchronous)
        pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, NULL);
    pthread_cleanup_push(cleanup, NULL);
    pthread_cleanup_push(cleanup, NULL);
    atomic_fetch_add(&started, 1);
    char block[4096] = {0};
    for (;;)
        if (write(full_pipe[1], block, sizeof block) < 0)
            die("write");
    pthread_cleanup_pop(0);
    pthread_cleanup_pop(0);
    return NULL;
}

/* In a loop of writes, the same bytes to the same place. */
static void *busy(void *asynchronous)
{
    if (asynchronous)
        pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, NULL);
    pthread_cleanup_push(cleanup, NULL);
    pthread_cleanup_push(cleanup, NULL);
    atomic_fetch_add(&started, 1);
    char block[512];
    memset(block, 'c', sizeof block);
    for (;;)
        if (pwrite(fd, block, sizeof block, 0) != sizeof block)
            die("pwrite");
    pthread_cleanup_pop(0);
    pthread_cleanup_pop(0);
    return NULL;
}

static void cancel_load(void *(*body)(void *), int asynchronous)
{
    enum { ROUNDS = 60, THREADS = 8 };
    atomic_store(&cleanups, 0);
    atomic_store(&cancelled, 0);
    for (int round = 0; round < ROUNDS; round++) {
        pthread_t threads[THREADS];
        atomic_store(&started, 0);
        for (int i = 0; i < THREADS; i++)
            must(pthread_create(threads + i, NULL, body, asynchronous ? "" : NULL) == 0, "create");
        while (atomic_load(&started) < THREADS)
            rest(100);
        rest(round * 37 % 1000);
        for (int i = 0; i < THREADS; i++)
            pthread_cancel(threads[i]);
        for (int i = 0; i < THREADS; i++) {
            void *result;
            pthread_join(threads[i], &result);
            cancelled += result == PTHREAD_CANCELED;
        }
    }
    printf("%ld threads cancelled, %ld cleanups\n", cancelled, cleanups);
}

static void cancellation(void)
{
    must(pipe(full_pipe) == 0, "pipe");
    fcntl(full_pipe[1], F_SETFL, O_NONBLOCK);
    char block[4096] = {0};
    while (write(full_pipe[1], block, sizeof block) > 0)
        ;
    fcntl(full_pipe[1], F_SETFL, 0);
    cancel_load(blocked, 0);
    cancel_load(blocked, 1);
    cancel_load(busy, 0);
    cancel_load(busy, 1);
}

/* --- stacks --- */

static void *little_thread(void *first)
{
    for (long i = 0; i < 20; i++)
        record((long)first + i);
    return NULL;
}

static void small_stacks(void)
{
    pthread_attr_t small;
    pthread_attr_init(&small);
    must(pthread_attr_setstacksize(&small, 16384) == 0, "stack size");
    for (long round = 0; round < 100; round++) {
        pthread_t threads[4];
        for (long i = 0; i < 4; i++)
            must(pthread_create(threads + i, &small, little_thread, (void *)(i * 20)) == 0,
                 "create");
        for (int i = 0; i < 4; i++)
            pthread_join(threads[i], NULL);
        rest(500);
    }
    puts("400 threads");
}

static volatile sig_atomic_t handled;

static void on_signal(int signal)
{
    (void)signal;
    /* No formatting here: the stack is as small as it may be. */
    static const char text[] = "handled\n";
    if (pwrite(fd, text, 8, handled % 100 * 8) != 8)
        _exit(4);
    handled++;
}

static void alternate_stack(void)
{
    /* The least that the kernel asks for, and what the handler itself is allowed. */
    size_t size = getauxval(AT_MINSIGSTKSZ) + 1024;
    stack_t stack = {.ss_sp = mmap(NULL, 65536, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
                     .ss_size = size};
    /* Whoever overruns it hits this. */
    must(mprotect(stack.ss_sp, 32768, PROT_NONE) == 0, "mprotect");
    stack.ss_sp = (char *)stack.ss_sp + 32768;
    must(sigaltstack(&stack, NULL) == 0, "sigaltstack");
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};
    sigaction(SIGUSR1, &action, NULL);
    /* The dynamic linker needs more than that to find pwrite. */
    record(0);
    for (int i = 0; i < 2000; i++) {
        raise(SIGUSR1);
        rest(100);
    }
    printf("%d signals\n", (int)handled);
}

/* --- jumps --- */

static sigjmp_buf back;
static volatile sig_atomic_t jumps;

static void jump(int signal)
{
    (void)signal;
    jumps++;
    siglongjmp(back, 1);
}

static void long_jumps(void)
{
    struct sigaction action = {.sa_handler = jump};
    sigaction(SIGALRM, &action, NULL);
    must(pipe(full_pipe) == 0, "pipe");
    fcntl(full_pipe[1], F_SETFL, O_NONBLOCK);
    char block[4096] = {0};
    while (write(full_pipe[1], block, sizeof block) > 0)
        ;
    fcntl(full_pipe[1], F_SETFL, 0);
    for (volatile long i = 0; i < 300; i++) {
        if (sigsetjmp(back, 1) == 0) {
            ualarm(2000, 0);
            if (write(full_pipe[1], block, sizeof block))
                die("the pipe was full");
        }
        record(i);
    }
    printf("%d jumps\n", (int)jumps);
}

static ucontext_t main_context, contexts[3];

static void coroutine(int which)
{
    for (long i = 0; i < 1500; i++) {
        record(i * 3 + which);
        swapcontext(contexts + which, contexts + (which + 1) % 3);
    }
}

static void swap_contexts(void)
{
    static char stacks[3][32768];
    for (int i = 0; i < 3; i++) {
        getcontext(contexts + i);
        contexts[i].uc_stack.ss_sp = stacks[i];
        contexts[i].uc_stack.ss_size = sizeof stacks[i];
        contexts[i].uc_link = &main_context;
        makecontext(contexts + i, (void (*)(void))coroutine, 1, i);
    }
    swapcontext(&main_context, contexts);
    puts("4500 switches");
}

static void nested_signals(void)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_NODEFER};
    sigaction(SIGUSR1, &action, NULL);
    pid_t parent = getpid();
    pid_t child = fork();
    if (child == 0) {
        for (int i = 0; i < 3000; i++) {
            kill(parent, SIGUSR1);
            rest(50);
        }
        _exit(0);
    }
    long i = 0;
    while (waitpid(child, NULL, WNOHANG) == 0)
        record(100 + i++ % 50);
    for (i = 0; i < 50; i++)
        record(100 + i);
    must(handled > 100, "handlers");
    puts("signals in writes");
}

/* --- processes --- */

static void vfork_storm(void)
{
    static int failures;
    static long i;
    for (i = 0; i < 1500; i++) {
        pid_t child = vfork();
        if (child == 0) {
            if (i % 5 == 0) {
                execl("/bin/true", "true", (char *)NULL);
                _exit(9);
            }
            _exit(pwrite(fd, "0123456789abcdef", 16, i * 16) == 16 ? (int)(i % 100) : 111);
        }
        int status;
        must(waitpid(child, &status, 0) == child, "waitpid");
        failures += status != (i % 5 == 0 ? 0 : (int)(i % 100) << 8);
        record(i);
    }
    printf("%d wrong statuses\n", failures);
}

#ifdef WITH_SECCOMP
static void seccomp_allowlist(void)
{
    /* Exactly what it needs; anything else kills it. */
    static const int calls[] = {
        SCMP_SYS(write), SCMP_SYS(pwrite64), SCMP_SYS(clock_nanosleep), SCMP_SYS(exit_group),
    };
    fflush(stdout);
    record(0);
    scmp_filter_ctx filter = seccomp_init(SCMP_ACT_KILL_PROCESS);
    must(filter != NULL, "seccomp_init");
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
        must(seccomp_rule_add(filter, SCMP_ACT_ALLOW, calls[i], 0) == 0, "seccomp_rule_add");
    must(seccomp_load(filter) == 0, "seccomp_load");
    for (long i = 0; i < 3000; i++) {
        record(i);
        rest(200);
    }
    _exit(write(1, "alive\n", 6) != 6);
}
#endif

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    file = argv[2];
    end_in_time(100);
    fd = open(file, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    must(fd >= 0, file);
    static const struct {
        const char *name;
        void (*run)(void);
    } all[] = {
        {"cancel", cancellation},   {"small-stacks", small_stacks},
        {"altstack", alternate_stack}, {"longjmp", long_jumps},
        {"contexts", swap_contexts}, {"signals", nested_signals},
        {"vfork", vfork_storm},
#ifdef WITH_SECCOMP
        {"seccomp", seccomp_allowlist},
#endif
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!strcmp(argv[1], all[i].name)) {
            all[i].run();
            return 0;
        }
    return 2;
}
