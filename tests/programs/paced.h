/* What the writers of the benchmark share with it: a file that both sides see, with a
 * few words to steer by and, for each millisecond, the longest latency and the number of calls.
 *
 * Latency is counted from the time a call was *due*, so that a writer who is stopped
 * between two calls shows it as much as one who is kept inside one. */
#ifndef PACED_H
#define PACED_H

#include "common.h"

/* Words of the file; `bench/control.rs` has the same list. */
enum { READY, PID, RUN, RATE, BURST, REACHED, CALLS, BUCKETS, ORIGIN, IDLE };
enum { PAUSE, GO, END };

struct bucket {
    _Atomic uint32_t longest_us; /* of the calls due in it */
    _Atomic uint32_t calls;      /* that ended in it */
};

static _Atomic uint64_t *control;
static struct bucket *buckets;

static void control_open(const char *path)
{
    struct stat st;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) != 0)
        die(path);
    char *at = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        die("mmap");
    close(fd);
    control = (_Atomic uint64_t *)at;
    buckets = (struct bucket *)(at + 4096);
    /* The default slack would make every pause 50 us longer. */
    prctl(PR_SET_TIMERSLACK, 1);
    atomic_store(&control[PID], (uint64_t)getpid());
    atomic_store(&control[READY], 1);
}

static struct bucket *bucket_of(uint64_t ns)
{
    uint64_t n = (ns - control[ORIGIN]) / 1000000;
    return &buckets[n < control[BUCKETS] ? n : control[BUCKETS] - 1];
}

static void note(uint64_t due, uint64_t end)
{
    struct bucket *b = bucket_of(due);
    uint64_t us = (end - due) / 1000;
    if (us > b->longest_us)
        b->longest_us = us > UINT32_MAX ? UINT32_MAX : (uint32_t)us;
    b = bucket_of(end);
    b->calls = b->calls + 1;
    atomic_store(&control[REACHED], due);
}

static void sleep_until(uint64_t ns)
{
    struct timespec t = {(time_t)(ns / 1000000000), (long)(ns % 1000000000)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
        ;
}

/* Makes calls as the words say, until told to end. */
static void paced(void (*call)(void))
{
    while (control[RUN] != END) {
        for (uint64_t left = control[BURST]; left; left--) {
            call();
            atomic_fetch_add(&control[CALLS], 1);
        }
        control[BURST] = 0;
        uint64_t due = now_ns(), end;
        while (control[RUN] == GO) {
            uint64_t rate = control[RATE];
            if (rate && now_ns() < due)
                sleep_until(due);
            call();
            end = now_ns();
            note(due, end);
            atomic_fetch_add(&control[CALLS], 1);
            /* Without a rate the next call is due when this one has ended. */
            due = rate ? due + 1000000000 / rate : end;
        }
        if (control[RUN] == PAUSE && !control[BURST]) {
            control[IDLE] = 1;
            while (control[RUN] == PAUSE && !control[BURST])
                usleep(5000);
            control[IDLE] = 0;
        }
    }
}

#endif
