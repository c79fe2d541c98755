/* generations DIR SECONDS
 *
 * Replaces files the way editors and package managers do, in numbered
 * generations, until SIGTERM. Generation g:
 *
 *   1. a.tmp is created, written, renamed over a
 *   2. b.tmp likewise over b
 *   3. gen-g is created and written
 *   4. index.tmp is renamed over index
 *   5. gen-(g-3) is unlinked
 *
 * A file holds g, its length, and words that follow from g; one write each. */
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

static void write_file(const char *name, uint64_t g, size_t words)
{
    static uint64_t w[8192];
    w[0] = g;
    w[1] = words;
    for (size_t i = 2; i < words; i++)
        w[i] = g * 0x9e3779b97f4a7c15u + i;
    int fd = open(at(name), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0)
        die(name);
    uint64_t start = now_ns();
    if (write(fd, w, words * 8) != (ssize_t)(words * 8))
        die("write");
    stats_took(now_ns() - start);
    close(fd);
}

static void replace(const char *name, uint64_t g, size_t words)
{
    char unfinished[64];
    snprintf(unfinished, sizeof unfinished, "%s.tmp", name);
    write_file(unfinished, g, words);
    if (rename(at(unfinished), at(name)) != 0)
        die("rename");
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    dir = argv[1];
    stats_open();
    signal(SIGTERM, on_term);
    end_in_time((unsigned)number(argv[2]));
    for (uint64_t g = 1; !stop; g++) {
        char name[64];
        size_t words = 2 + (g * 2654435761u >> 7) % 8190;
        replace("a", g, words);
        replace("b", g, words);
        snprintf(name, sizeof name, "gen-%llu", (unsigned long long)g);
        write_file(name, g, words);
        replace("index", g, 2);
        if (g > 3) {
            snprintf(name, sizeof name, "gen-%llu", (unsigned long long)(g - 3));
            if (unlink(at(name)) != 0)
                die("unlink");
        }
        atomic_fetch_add(&stats->beats, 1);
    }
    printf("generations %llu\n", (unsigned long long)stats->beats);
    return 0;
}
