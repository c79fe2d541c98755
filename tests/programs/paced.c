/* paced CONTROL pages FILE SEED      random blocks of 4 KiB of a file that is there
 * paced CONTROL ordered DIR FILES L  records (lanes.h) of L lanes in turn, one file after the other
 * paced CONTROL log DIR              a record in a log, then its place in an index
 *
 * The writers of the benchmark. What a copy has to look like is checked by bench/check.rs. */
#include "lanes.h"
#include "paced.h"

#define BLOCK 4096
#define GOLDEN 0x9e3779b97f4a7c15u

static uint64_t words[BLOCK / 8];
static uint64_t serial; /* of the newest record */

static void put(int fd, const void *what, size_t bytes, off_t at)
{
    ssize_t done = at < 0 ? write(fd, what, bytes) : pwrite(fd, what, bytes, at);
    if (done != (ssize_t)bytes) {
        if (done >= 0)
            errno = ENOSPC;
        die("writing");
    }
}

/* Which block record k goes to is the k-th number of a generator that the checker has, too. */
static int pages_fd;
static uint64_t pages, generator;

static void pages_call(void)
{
    generator += GOLDEN;
    uint64_t z = generator;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    serial++;
    for (size_t i = 0; i < BLOCK / 8; i++)
        words[i] = serial + i * GOLDEN;
    put(pages_fd, words, BLOCK, (off_t)(z % pages * BLOCK));
}

static struct lanes lanes;
static int *fds, next_file, lane;

static void ordered_call(void)
{
    size_t n = lanes.record / 8;
    if (next_file == 0) {
        lane = (lane + 1) % lanes.lanes;
        serial += lane == 0;
        lane_fill(words, n, serial, (uint64_t)lane);
    }
    words[2] = (uint64_t)next_file;
    words[n - 1] = 0;
    for (size_t i = 0; i < n - 1; i++)
        words[n - 1] += words[i];
    put(fds[next_file], words, lanes.record, (off_t)lanes.record * lane);
    next_file = (next_file + 1) % lanes.files;
}

static int log_fd, index_fd;
static uint64_t log_end, entry[4];

static void log_call(void)
{
    if (!entry[2]) {
        size_t n = 8 + ++serial % 25;
        words[0] = serial;
        words[1] = n;
        for (size_t i = 2; i < n; i++)
            words[i] = serial * GOLDEN + i;
        put(log_fd, words, n * 8, -1);
        entry[0] = serial, entry[1] = log_end, entry[2] = n * 8, entry[3] = ~serial;
        log_end += n * 8;
    } else {
        put(index_fd, entry, sizeof entry, -1);
        entry[2] = 0;
    }
}

static int open_in(const char *dir, const char *name, int flags)
{
    char path[4096];
    snprintf(path, sizeof path, "%s%s%s", dir, *name ? "/" : "", name);
    int fd = open(path, O_RDWR | O_CLOEXEC | flags, 0644);
    if (fd < 0)
        die(path);
    return fd;
}

int main(int argc, char **argv)
{
    if (argc < 4)
        return 2;
    const char *mode = argv[2], *at = argv[3];
    void (*call)(void);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    stats_open();
    if (!strcmp(mode, "pages") && argc == 5) {
        struct stat st;
        pages_fd = open_in(at, "", 0);
        generator = (uint64_t)number(argv[4]);
        if (fstat(pages_fd, &st) != 0 || st.st_size < BLOCK)
            die("fstat");
        pages = (uint64_t)st.st_size / BLOCK;
        call = pages_call;
    } else if (!strcmp(mode, "ordered") && argc == 6) {
        lanes = (struct lanes){.dir = at, .files = (int)number(argv[4]), .record = BLOCK};
        lanes.lanes = (int)number(argv[5]);
        lane = lanes.lanes - 1;
        lanes_create(&lanes);
        fds = lanes_open(&lanes);
        call = ordered_call;
    } else if (!strcmp(mode, "log") && argc == 4) {
        log_fd = open_in(at, "log", O_CREAT | O_APPEND | O_TRUNC);
        index_fd = open_in(at, "index", O_CREAT | O_APPEND | O_TRUNC);
        call = log_call;
    } else {
        return 2;
    }
    control_open(argv[1]);
    paced(call);
    return 0;
}
