/* A program whose logical update is one write of a number into each of M files, in
 * a few pieces each, and then, by the mode:
 *
 *   sync     fsync of each file
 *   lock     all of it under a write lock (fcntl) on a file "lock"
 *   flock    the same with flock
 *   map      the same with stores into a mapping, which is made for each of them
 *   close    the files are opened for each update and closed after it
 *   rename   one file, written aside and put in place by rename
 *   unit     snapshim_begin and snapshim_end
 *   none     nothing
 *
 * units MODE DIRECTORY FILES PIECES PAUSE_US [UNITS]
 *
 * With UNITS_STDIO=N, pieces from number N on are written by stdio, each flushed at once.
 *
 * A file holds PIECES numbers of 8 bytes. A copy is whole if all of them, in all files, are
 * equal. PAUSE_US is slept between pieces, so that most moments are in the middle.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../include/snapshim.h"

#define MOST 64

static const char *directory;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static int open_file(const char *name, int number) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s%d", directory, name, number);
    int fd = open(path, O_RDWR | O_CREAT, 0644);
    if (fd < 0) die(path);
    return fd;
}

static void lock(int fd, int kind) {
    struct flock how = {.l_type = kind, .l_whence = SEEK_SET};
    while (fcntl(fd, F_SETLKW, &how) != 0)
        if (errno != EINTR) die("fcntl");
}

/* From this piece on by stdio. */
static int by_stdio = 1 << 30;

static void put(int fd, int piece, uint64_t unit) {
    static FILE *streams[1024];
    if (piece >= by_stdio && fd < 1024) {
        FILE *stream = streams[fd];
        if (!stream) stream = streams[fd] = fdopen(fd, "r+");
        if (!stream || fseek(stream, piece * 8, SEEK_SET) != 0) die("stdio");
        if (fwrite(&unit, 8, 1, stream) != 1 || fflush(stream) != 0) die("fwrite");
        return;
    }
    if (pwrite(fd, &unit, 8, piece * 8) != 8) die("pwrite");
}

/* A store into a mapping that is there for a while, and gone when the lock is still held. */
static void store(int fd, int pieces, int piece, uint64_t unit, useconds_t pause) {
    volatile uint64_t *at = mmap(0, pieces * 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) die("mmap");
    at[piece] = unit;
    if (pause) usleep(pause);
    munmap((void *)at, pieces * 8);
}

int main(int argc, char **argv) {
    if (argc < 6) return 2;
    const char *mode = argv[1];
    directory = argv[2];
    int files = atoi(argv[3]), pieces = atoi(argv[4]);
    useconds_t pause = atoi(argv[5]);
    uint64_t units = argc > 6 ? strtoull(argv[6], 0, 10) : UINT64_MAX;
    int is_lock = !strcmp(mode, "lock"), is_flock = !strcmp(mode, "flock");
    int is_close = !strcmp(mode, "close"), is_rename = !strcmp(mode, "rename");
    int is_unit = !strcmp(mode, "unit"), is_map = !strcmp(mode, "map");
    int is_sync = !strcmp(mode, "sync");
    if (getenv("UNITS_STDIO")) by_stdio = atoi(getenv("UNITS_STDIO"));
    if (files > MOST) return 2;
    int fds[MOST], guard = -1;
    if (is_map) is_lock = 1;
    if (is_lock || is_flock) guard = open_file("lock", 0);
    for (int i = 0; i < files && !is_close && !is_rename; i++) fds[i] = open_file("f", i);
    for (int i = 0; i < files && is_map; i++)
        if (ftruncate(fds[i], pieces * 8) != 0) die("ftruncate");
    for (uint64_t unit = 1; unit <= units; unit++) {
        if (is_lock) lock(guard, F_WRLCK);
        if (is_flock && flock(guard, LOCK_EX) != 0) die("flock");
        if (is_unit) snapshim_begin();
        for (int i = 0; i < files; i++) {
            if (is_close) fds[i] = open_file("f", i);
            if (is_rename) fds[i] = open_file("new", i);
        }
        for (int piece = 0; piece < pieces; piece++)
            for (int i = 0; i < files; i++) {
                if (is_map) store(fds[i], pieces, piece, unit, pause);
                else put(fds[i], piece, unit);
                if (pause) usleep(pause);
            }
        for (int i = 0; i < files; i++) {
            if (is_sync && fsync(fds[i]) != 0) die("fsync");
            if (is_close || is_rename) close(fds[i]);
        }
        for (int i = 0; i < files && is_rename; i++) {
            char from[4096], to[4096];
            snprintf(from, sizeof from, "%s/new%d", directory, i);
            snprintf(to, sizeof to, "%s/f%d", directory, i);
            if (rename(from, to) != 0) die("rename");
        }
        if (is_lock) lock(guard, F_UNLCK);
        if (is_flock && flock(guard, LOCK_UN) != 0) die("flock");
        if (is_unit) snapshim_end();
        if (pause) usleep(pause);
    }
    return 0;
}
