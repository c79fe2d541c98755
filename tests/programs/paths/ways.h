/* What the programs of the path suite have in common: records, and the loop that
 * makes them. */
#ifndef WAYS_H
#define WAYS_H

#include "../common.h"

enum { RECORD = 64, RECORDS = 256, SIZE = RECORD * RECORDS };

static const char *name, *file;
static int fd = -1; /* FILE */
static char rec[RECORD + 1];

UNUSED static off_t place(long i)
{
    return i % RECORDS * RECORD;
}

static void fill(long i)
{
    snprintf(rec, sizeof rec, "%-20.20s %042ld\n", name, i);
}

static void check(long result, const char *what)
{
    if (result < 0)
        die(what);
}

UNUSED static const char *beside(const char *suffix)
{
    static char path[4][4096];
    static int next;
    char *at = path[next++ % 4];
    snprintf(at, sizeof *path, "%s.%s", file, suffix);
    return at;
}

static int open_file(const char *path, int flags)
{
    int opened = open(path, flags | O_CLOEXEC, 0666);
    check(opened, path);
    return opened;
}

static int true_stderr; /* if standard error is FILE */

struct way {
    const char *name;
    void (*record)(long i);
    void (*begin)(void);
};

/* The program: `list`, or NAME FILE N. */
static int run_way(int argc, char **argv, const struct way *ways, size_t count_of_ways)
{
    if (argc == 2 && !strcmp(argv[1], "list")) {
        for (size_t k = 0; k < count_of_ways; k++)
            puts(ways[k].name);
        return 0;
    }
    if (argc != 4)
        return 2;
    name = argv[1];
    file = argv[2];
    long count = number(argv[3]);
    const struct way *way = NULL;
    for (size_t k = 0; k < count_of_ways; k++)
        if (!strcmp(ways[k].name, name))
            way = &ways[k];
    if (!way) {
        fprintf(stderr, "no way %s\n", name);
        return 2;
    }
    alarm(120);
    pid_t parent = getppid();
    fd = open_file(file, O_RDWR | O_CREAT);
    static char zeros[SIZE];
    check(pwrite(fd, zeros, SIZE, 0), "pwrite");
    if (way->begin)
        way->begin();
    long i = 1;
    for (; count == 0 || i <= count; i++) {
        fill(i);
        way->record(i);
        if (count == 0) {
            struct timespec pace = {0, 300000};
            nanosleep(&pace, NULL);
            /* Whoever started us was killed. */
            if (getppid() != parent)
                break;
        }
    }
    if (!strcmp(name, "seccomp"))
        _exit(7);
    if (true_stderr)
        dup2(true_stderr, 2);
    fprintf(stderr, "%s: %ld records\n", name, i - 1);
    return 0;
}

#endif
