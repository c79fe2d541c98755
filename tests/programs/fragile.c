/* A program that is safe as long as nobody kills it: it writes a number into many places of
 * two files, one after the other, and refuses to start if they do not agree.
 *
 * fragile run DIRECTORY LOG    a line in LOG at each start: "start NUMBER" or "corrupt"
 * fragile check DIRECTORY      0 if they agree
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#define PLACES 8

static int open_file(const char *directory, const char *name, int flags) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    int fd = open(path, flags, 0644);
    if (fd < 0 && flags & O_CREAT) {
        perror(path);
        exit(1);
    }
    return fd;
}

/* The number in both, or -1. */
static int64_t read_all(int a, int b) {
    int64_t numbers[2][PLACES] = {{0}};
    if (a >= 0 && pread(a, numbers[0], sizeof numbers[0], 0) < 0) return -1;
    if (b >= 0 && pread(b, numbers[1], sizeof numbers[1], 0) < 0) return -1;
    for (int i = 0; i < PLACES; i++)
        if (numbers[0][i] != numbers[0][0] || numbers[1][i] != numbers[0][0]) return -1;
    return numbers[0][0];
}

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    int only_looks = !strcmp(argv[1], "check");
    int flags = only_looks ? O_RDONLY : O_RDWR | O_CREAT;
    int a = open_file(argv[2], "a", flags), b = open_file(argv[2], "b", flags);
    int64_t number = read_all(a, b);
    if (only_looks) return number < 0;
    if (argc < 4) return 2;
    FILE *log = fopen(argv[3], "a");
    if (!log) return 1;
    if (number < 0) {
        fprintf(log, "corrupt\n");
        return 9;
    }
    fprintf(log, "start %lld\n", (long long)number);
    fclose(log);
    for (;;) {
        number++;
        flock(a, LOCK_EX);
        for (int i = 0; i < PLACES; i++) {
            if (pwrite(a, &number, 8, i * 8) != 8 || pwrite(b, &number, 8, i * 8) != 8) return 1;
            usleep(300);
        }
        flock(a, LOCK_UN);
        usleep(300);
    }
}
