/* blocks FILE BLOCKS PACE_US
 *
 * Writes blocks of 4 KiB over a file, until SIGTERM. Write n puts its number, all over, into a
 * block that follows from n (but the first block), and then into the first eight bytes of the
 * file: so it can be told from that number what every block has to be. */
#include "common.h"

enum { BLOCK = 4096 };

static volatile sig_atomic_t over;

static void on_term(int signal)
{
    (void)signal;
    over = 1;
}

static uint64_t mixed(uint64_t n)
{
    n = (n ^ (n >> 30)) * 0xbf58476d1ce4e5b9u;
    n = (n ^ (n >> 27)) * 0x94d049bb133111ebu;
    return n ^ (n >> 31);
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    uint64_t blocks = strtoull(argv[2], NULL, 10), words[BLOCK / 8];
    long pace_us = strtol(argv[3], NULL, 10);
    signal(SIGTERM, on_term);
    stats_open();
    memset(words, 0, sizeof words);
    int fd = open(argv[1], O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0)
        die(argv[1]);
    for (uint64_t i = 0; i < blocks; i++)
        if (pwrite(fd, words, BLOCK, (off_t)(i * BLOCK)) != BLOCK)
            die("filling");
    for (uint64_t n = 1; !over; n++) {
        for (int i = 0; i < BLOCK / 8; i++)
            words[i] = n;
        if (pwrite(fd, words, BLOCK, (off_t)((1 + mixed(n) % (blocks - 1)) * BLOCK)) != BLOCK ||
            pwrite(fd, &n, sizeof n, 0) != (ssize_t)sizeof n)
            die("writing");
        atomic_fetch_add(&stats->beats, 1);
        if (pace_us)
            nanosleep(&(struct timespec){pace_us / 1000000, pace_us % 1000000 * 1000}, NULL);
    }
    return 0;
}
