/* byways DIR HOW
 *
 * Among 1,200 files that stay as they are, changes DIR/a/x and then DIR/z/y, again and again: no state in which
 * y is newer than x ever was. How x is changed is hard to see:
 *
 *   tmpfile   by a descriptor of a file that had no name when it was opened
 *   renamed   by a descriptor that was opened by a name which is another file's now
 *   outside   by a hard link beside DIR, which comes and goes
 *   mapped    by a mapping that is made and removed for each store; and by plain writes in between
 *
 * or, with y for the order of the rest:
 *
 *   again     directory DIR/k7/d is removed and made again, with one file, whose name is a number: y holds a
 *             number that was there; DIR/z/gone holds the last that is not any more
 */
#include "common.h"

static const char *dir;
static volatile sig_atomic_t stop;

static void on_term(int sig)
{
    (void)sig;
    stop = 1;
}

static const char *at(const char *name)
{
    static char paths[4][4096];
    static int next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", dir, name);
    return path;
}

static int make(const char *name, int flags)
{
    int fd = open(at(name), O_RDWR | O_CREAT | O_CLOEXEC | flags, 0644);
    if (fd < 0)
        die(name);
    return fd;
}

static void put(int fd, uint64_t k, off_t where)
{
    char text[32];
    snprintf(text, sizeof text, "%016llu\n", (unsigned long long)k);
    if (pwrite(fd, text, 17, where) != 17)
        die("pwrite");
}

static int open_x(const char *how)
{
    char link_of[64];
    if (!strcmp(how, "tmpfile")) {
        int fd = open(at("a"), O_TMPFILE | O_RDWR | O_CLOEXEC, 0644);
        snprintf(link_of, sizeof link_of, "/proc/self/fd/%d", fd);
        if (fd < 0 || linkat(AT_FDCWD, link_of, AT_FDCWD, at("a/x"), AT_SYMLINK_FOLLOW) != 0)
            die("tmpfile");
        return fd;
    }
    if (!strcmp(how, "renamed")) {
        int fd = make("a/w", O_EXCL);
        if (link(at("a/w"), at("a/x")) != 0 || unlink(at("a/w")) != 0)
            die("link");
        close(make("a/w", O_EXCL));
        return fd;
    }
    return make("a/x", O_EXCL);
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    dir = argv[1];
    const char *how = argv[2];
    signal(SIGTERM, on_term);
    stats_open();
    char name[64];
    for (int i = 0; i < 400; i++) {
        snprintf(name, sizeof name, "k%d", i);
        if (mkdir(at(name), 0755) != 0)
            die(name);
        for (int j = 0; j < 3; j++) {
            snprintf(name, sizeof name, "k%d/%d", i, j);
            close(make(name, O_EXCL));
        }
    }
    if (mkdir(at("a"), 0755) != 0 || mkdir(at("z"), 0755) != 0 || mkdir(at("k7/d"), 0755) != 0)
        die("mkdir");
    int y = make("z/y", O_EXCL), gone = make("z/gone", O_EXCL);
    int x = open_x(how);
    if (ftruncate(x, 8192) != 0)
        die("x");
    int by = -1;
    for (uint64_t k = 1; !stop; k++) {
        if (!strcmp(how, "outside")) {
            /* It is left alone for long enough to count as such. */
            if (k % 60 == 1) {
                if (link(at("a/x"), at("../outside")) != 0)
                    die("outside");
                by = open(at("../outside"), O_RDWR | O_CLOEXEC);
            }
            put(by, k, 0);
            put(y, k, 0);
            if (k % 60 == 50) {
                close(by);
                unlink(at("../outside"));
                usleep(60000);
                k = (k / 60 + 1) * 60;
            }
        } else if (!strcmp(how, "mapped")) {
            char text[32];
            snprintf(text, sizeof text, "%016llu\n", (unsigned long long)k);
            char *map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, x, 0);
            if (map == MAP_FAILED)
                die("mmap");
            memcpy(map, text, 17);
            munmap(map, 4096);
            put(y, k, 0);
            if (k % 8 == 0)
                put(x, k, 4096);
        } else if (!strcmp(how, "again")) {
            snprintf(name, sizeof name, "k7/d/%llu", (unsigned long long)k - 1);
            if (k > 1)
                put(gone, k - 1, 0);
            if (k > 1 && unlink(at(name)) != 0)
                die(name);
            if (rmdir(at("k7/d")) != 0 || mkdir(at("k7/d"), 0755) != 0)
                die("k7/d");
            snprintf(name, sizeof name, "k7/d/%llu", (unsigned long long)k);
            close(make(name, O_EXCL));
            put(y, k, 0);
        } else {
            put(x, k, 0);
            put(y, k, 0);
        }
        atomic_fetch_add(&stats->beats, 1);
        usleep(300);
    }
    return 0;
}
