/* churn DIR FILES BYTES
 *
 * Writes over FILES files of BYTES each in DIR, at random places, and now and then replaces
 * one by a rename, until it is ended. A file system that is full is no reason to end. */
#include "common.h"
#include <time.h>

static unsigned long long state = 1;

static unsigned long long next_number(void)
{
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return state >> 33;
}

static void path_of(char *path, size_t size, const char *dir, int file, const char *tail)
{
    snprintf(path, size, "%s/file-%d%s", dir, file, tail);
}

/* Makes a file whole under another name first; 0 if there is no room for it. */
static int replace(const char *dir, int file, size_t bytes)
{
    char path[4096], temp[4096], block[4096];
    path_of(path, sizeof path, dir, file, "");
    path_of(temp, sizeof temp, dir, file, ".new");
    memset(block, 'a' + (int)(next_number() % 26), sizeof block);
    int fd = open(temp, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (fd < 0)
        return 0;
    size_t done = 0;
    while (done < bytes) {
        ssize_t wrote = write(fd, block, sizeof block);
        if (wrote <= 0)
            break;
        done += (size_t)wrote;
    }
    close(fd);
    if (done < bytes || rename(temp, path)) {
        unlink(temp);
        return 0;
    }
    return 1;
}

int main(int argc, char **argv)
{
    if (argc != 4) {
        fprintf(stderr, "usage: %s DIR FILES BYTES\n", argv[0]);
        return 2;
    }
    int files = atoi(argv[2]);
    size_t bytes = (size_t)atol(argv[3]);
    if (files < 1 || bytes < 8192 || bytes % 4096)
        return 2;
    for (int file = 0; file < files; file++)
        if (!replace(argv[1], file, bytes))
            return 1;
    for (;;) {
        int file = (int)(next_number() % (unsigned)files);
        if (next_number() % 64 == 0)
            replace(argv[1], file, bytes);
        char path[4096], text[100];
        path_of(path, sizeof path, argv[1], file, "");
        int fd = open(path, O_WRONLY);
        if (fd >= 0) {
            memset(text, 'A' + (int)(next_number() % 26), sizeof text);
            ssize_t ignored = pwrite(fd, text, sizeof text, (off_t)(next_number() % (bytes - sizeof text)));
            (void)ignored;
            close(fd);
        }
        struct timespec pause = {.tv_nsec = 1000000};
        nanosleep(&pause, NULL);
    }
}
