/* rounds DIR FILES PACE_US
 *
 * Goes round FILES files in directories of fifty, until SIGTERM. Operation k is about file k % FILES,
 * and changes it in one of the ways of `change`; what it ends with is the number k. So the state
 * after any number of operations is known: of the files before k % FILES the last number is
 * of this round, of those after it, of the round before.
 *
 * Files of which k % 4 is 3 in each round stay as they were made (0). */
#include "common.h"

static const char *dir;
static uint64_t files;
static volatile sig_atomic_t stop;

static void on_term(int sig)
{
    (void)sig;
    stop = 1;
}

static void name(char *path, uint64_t file, const char *more)
{
    snprintf(path, 4096, "%s/d%llu/f%llu%s", dir, (unsigned long long)(file / 50),
             (unsigned long long)file, more);
}

static void put(int fd, uint64_t k)
{
    char text[18];
    snprintf(text, sizeof text, "%016llu\n", (unsigned long long)k);
    if (write(fd, text, 17) != 17)
        die("write");
}

static void make(const char *path, uint64_t k, int flags)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC | flags, 0644);
    if (fd < 0)
        die(path);
    put(fd, k);
    close(fd);
}

static void change(uint64_t k, uint64_t how)
{
    char path[4096], other[4096], text[18];
    name(path, k % files, "");
    name(other, k % files, ".new");
    int fd;
    switch (how) {
    case 0: /* another number at the end */
        make(path, k, O_APPEND);
        break;
    case 1: /* all anew, in place */
        make(path, k, O_TRUNC);
        break;
    case 2: /* replaced */
        make(other, k, O_EXCL);
        if (rename(other, path) != 0)
            die("rename");
        break;
    case 3: /* removed, and made again */
        if (unlink(path) != 0)
            die("unlink");
        make(path, k, O_EXCL);
        break;
    case 4: /* the first number, and cut down to that */
        fd = open(path, O_WRONLY | O_CLOEXEC);
        if (fd < 0)
            die(path);
        snprintf(text, sizeof text, "%016llu\n", (unsigned long long)k);
        if (ftruncate(fd, 17) != 0 || pwrite(fd, text, 17, 0) != 17)
            die("pwrite");
        close(fd);
        break;
    default: /* by another name, which takes its place */
        make(other, k, O_EXCL);
        if (unlink(path) != 0 || link(other, path) != 0 || unlink(other) != 0)
            die("link");
    }
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    dir = argv[1];
    files = strtoull(argv[2], NULL, 10);
    long pace = strtol(argv[3], NULL, 10);
    signal(SIGTERM, on_term);
    stats_open();
    char path[4096];
    for (uint64_t file = 0; file < files; file++) {
        if (file % 50 == 0) {
            name(path, file, "");
            *strrchr(path, '/') = 0;
            if (mkdir(path, 0755) != 0)
                die(path);
        }
        name(path, file, "");
        make(path, 0, O_EXCL);
    }
    uint64_t shelf = 0;
    for (uint64_t k = files; !stop; k++) {
        if (k % files % 4 == 3)
            continue;
        change(k, (k / files + k % files) % 6);
        /* A directory comes, and the one before goes. */
        if (k % 211 == 0) {
            snprintf(path, sizeof path, "%s/shelf%llu", dir, (unsigned long long)shelf + 1);
            if (mkdir(path, 0755) != 0)
                die(path);
            snprintf(path, sizeof path, "%s/shelf%llu", dir, (unsigned long long)shelf);
            if (shelf && rmdir(path) != 0)
                die(path);
            shelf++;
        }
        atomic_fetch_add(&stats->beats, 1);
        if (pace)
            usleep((useconds_t)pace);
    }
    return 0;
}
