/* What the test programs share: time, and measurements kept where they can be
 * read while the program runs and after it was killed. */
#ifndef COMMON_H
#define COMMON_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define UNUSED __attribute__((unused))

/* Read by stats.rs. Shared by all processes of a program. */
struct stats {
    _Atomic uint64_t beats;      /* records written, or turns of the main loop */
    _Atomic uint64_t longest_ns; /* the longest single call */
    _Atomic uint64_t turns;      /* turns of the difficult activity */
    _Atomic uint64_t stop;       /* everybody is to end */
};

static struct stats *stats;

UNUSED static void die(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    _exit(3);
}

UNUSED static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* The file named by SNAPSHIM_TEST_STATS, or memory of our own. Counts go on
 * where they were, for a program that executes itself. */
UNUSED static void stats_open(void)
{
    const char *path = getenv("SNAPSHIM_TEST_STATS");
    int flags = MAP_SHARED;
    int fd = -1;
    if (path) {
        fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
        if (fd < 0 || ftruncate(fd, sizeof *stats) != 0)
            die(path);
    } else {
        flags |= MAP_ANONYMOUS;
    }
    stats = mmap(NULL, sizeof *stats, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (stats == MAP_FAILED)
        die("mmap");
    if (fd >= 0)
        close(fd);
}

/* One call took `ns`. */
UNUSED static void stats_took(uint64_t ns)
{
    uint64_t seen = atomic_load(&stats->longest_ns);
    while (ns > seen && !atomic_compare_exchange_weak(&stats->longest_ns, &seen, ns))
        ;
}

/* Ends with the parent, and after `seconds` at the latest. */
UNUSED static void end_in_time(unsigned seconds)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (seconds)
        alarm(seconds);
}

UNUSED static long number(const char *text)
{
    char *end;
    long value = strtol(text, &end, 10);
    if (*end || end == text) {
        fprintf(stderr, "not a number: %s\n", text);
        exit(2);
    }
    return value;
}

#endif
