/* Ordered records. A lane is one thread; it writes record k into file 0, then
 * file 1, ... file N-1, each with one call, then k + 1 into file 0. What this
 * means for a consistent copy is checked by records.rs. */
#ifndef LANES_H
#define LANES_H

#include "common.h"
#include <sys/uio.h>

struct lanes {
    const char *dir;
    int files;
    int lanes;
    size_t record;
    long pace_us; /* pause after each record */
};

UNUSED static int lanes_open_one(const struct lanes *l, int file, int flags)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/f%04d", l->dir, file);
    int fd = open(path, O_RDWR | O_CLOEXEC | flags, 0644);
    if (fd < 0)
        die(path);
    return fd;
}

/* Makes all files at their full size. */
UNUSED static void lanes_create(const struct lanes *l)
{
    for (int f = 0; f < l->files; f++) {
        int fd = lanes_open_one(l, f, O_CREAT | O_TRUNC);
        if (ftruncate(fd, (off_t)(l->record * (size_t)l->lanes)) != 0)
            die("ftruncate");
        close(fd);
    }
}

UNUSED static int *lanes_open(const struct lanes *l)
{
    int *fds = calloc((size_t)l->files, sizeof *fds);
    if (!fds)
        die("calloc");
    for (int f = 0; f < l->files; f++)
        fds[f] = lanes_open_one(l, f, 0);
    return fds;
}

static void lane_fill(uint64_t *w, size_t n, uint64_t k, uint64_t lane)
{
    w[0] = k;
    w[1] = lane;
    for (size_t i = 3; i < n - 1; i++)
        w[i] = k * 0x9e3779b97f4a7c15u + (i - 3);
}

/* If set, all lanes write this way instead. */
UNUSED static ssize_t (*lane_writer)(int file, int fd, const void *record, size_t n, off_t at);

/* One record, by one of four calls: each lane has its own way. */
static ssize_t lane_write(int way, int fd, const void *record, size_t n, off_t at)
{
    struct iovec v[2] = {
        {.iov_base = (void *)record, .iov_len = n / 2},
        {.iov_base = (char *)record + n / 2, .iov_len = n - n / 2},
    };
    switch (way) {
    case 0:
        return pwrite(fd, record, n, at);
    case 1:
        return pwritev(fd, v, 2, at);
    case 2:
        if (lseek(fd, at, SEEK_SET) != at)
            die("lseek");
        return write(fd, record, n);
    default:
        if (lseek(fd, at, SEEK_SET) != at)
            die("lseek");
        return writev(fd, v, 2);
    }
}

/* Runs lane `lane` until told to stop. With few files it has descriptors of its
 * own, and so may use calls that move the file offset. `fds` may be NULL. */
UNUSED static void lane_run(const struct lanes *l, int lane, const int *shared)
{
    size_t n = l->record / 8;
    uint64_t *w = calloc(n, 8);
    int own = l->files <= 16 || !shared;
    int *fds = own ? lanes_open(l) : (int *)shared;
    if (!w)
        die("calloc");
    for (uint64_t k = 1; !atomic_load(&stats->stop); k++) {
        lane_fill(w, n, k, (uint64_t)lane);
        uint64_t base = 0;
        for (size_t i = 0; i < n - 1; i++)
            base += i == 2 ? 0 : w[i];
        for (int f = 0; f < l->files; f++) {
            w[2] = (uint64_t)f;
            w[n - 1] = base + (uint64_t)f;
            uint64_t start = now_ns();
            off_t at = (off_t)(l->record * (size_t)lane);
            ssize_t done = lane_writer ? lane_writer(f, fds[f], w, l->record, at)
                                       : lane_write(own ? lane % 4 : lane % 2, fds[f], w,
                                                    l->record, at);
            stats_took(now_ns() - start);
            if (done != (ssize_t)l->record) {
                if (done >= 0)
                    errno = ENOSPC;
                die("writing a record");
            }
        }
        atomic_fetch_add(&stats->beats, 1);
        if (l->pace_us)
            usleep((useconds_t)l->pace_us);
    }
    if (own) {
        for (int f = 0; f < l->files; f++)
            close(fds[f]);
        free(fds);
    }
    free(w);
}

UNUSED static void lanes_on_term(int sig)
{
    (void)sig;
    atomic_store(&stats->stop, 1);
}

#endif
