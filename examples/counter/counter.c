/* counter DIR: a program that knows nothing of snapshots.
 *
 * For ever: writes record k, 1 MiB full of k, to DIR/ledger, then k to DIR/total.
 * Whoever finds a total that is ahead of the ledger, or more than one behind it,
 * or a ledger that is part one record and part another, has lost data. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <signal.h>
#include <unistd.h>

enum { WORDS = 1 << 17 };

static int file(const char *dir, const char *name)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0644);
    if (fd < 0) {
        perror(path);
        exit(1);
    }
    return fd;
}

static void put(int fd, const void *data, size_t size)
{
    if (pwrite(fd, data, size, 0) != (ssize_t)size) {
        perror("write");
        exit(1);
    }
}

int main(int argc, char **argv)
{
    static uint64_t record[WORDS], total[8];
    if (argc != 2) {
        fprintf(stderr, "usage: %s DIR\n", argv[0]);
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    int ledger = file(argv[1], "ledger"), sum = file(argv[1], "total");
    for (uint64_t k = 1;; k++) {
        for (int i = 0; i < WORDS; i++)
            record[i] = k;
        for (int i = 0; i < 8; i++)
            total[i] = k;
        put(ledger, record, sizeof record);
        put(sum, total, sizeof total);
        usleep(200);
    }
}
