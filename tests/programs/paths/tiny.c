/* tiny FILE N: writes N records, or, if N is 0, until its parent is gone: with
 * pwrite, and every fourth with stdio. For any libc and any size of word. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    long count = atol(argv[2]);
    int fd = open(argv[1], O_RDWR | O_CREAT, 0666);
    FILE *stream = fopen(argv[1], "r+");
    pid_t parent = getppid();
    if (fd < 0 || !stream) {
        perror(argv[1]);
        return 3;
    }
    alarm(120);
    long i = 1;
    for (; count == 0 || i <= count; i++) {
        char record[65];
        long at = i % 256 * 64;
        snprintf(record, sizeof record, "tiny %058ld\n", i);
        if (i % 4 == 0) {
            if (fseek(stream, at, SEEK_SET) != 0 || fwrite(record, 1, 64, stream) != 64 ||
                fflush(stream) != 0)
                return 4;
        } else if (pwrite(fd, record, 64, at) != 64) {
            perror("pwrite");
            return 4;
        }
        if (count == 0) {
            struct timespec pace = {0, 300000};
            nanosleep(&pace, NULL);
            if (getppid() != parent)
                break;
        }
    }
    fprintf(stderr, "tiny: %ld records\n", i - 1);
    return 0;
}
