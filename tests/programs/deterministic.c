/* deterministic DIR: makes the same files on every run, as fast as it can, with
 * nearly every call that changes one. Prints a line for each result a program
 * could see: return values and errno. */
#include "common.h"
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <sys/xattr.h>

static uint64_t seed = 42;

static uint64_t next(void)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return seed >> 33;
}

/* The result of a call, as the program sees it; errno must be as it was. */
#define SAY(call)                                                                                  \
    do {                                                                                           \
        errno = 77;                                                                                \
        long result_ = (long)(call);                                                               \
        printf("%d %ld %d\n", __LINE__, result_, errno);                                           \
    } while (0)

static void *appender(void *arg)
{
    int index = (int)(intptr_t)arg;
    char name[32], line[64];
    snprintf(name, sizeof name, "thread-%d", index);
    int fd = open(name, O_WRONLY | O_CREAT | O_APPEND, 0640);
    for (int i = 0; i < 20000; i++) {
        int n = snprintf(line, sizeof line, "thread %d line %d\n", index, i);
        if (write(fd, line, (size_t)n) != n)
            die("append");
    }
    close(fd);
    return NULL;
}

int main(int argc, char **argv)
{
    static char block[65536];
    void *volatile nowhere = (void *)8;
    if (argc != 2 || chdir(argv[1]) != 0)
        return 2;
    umask(022);
    for (size_t i = 0; i < sizeof block; i++)
        block[i] = (char)next();

    /* Bytes and sizes of one file. */
    int fd = open("bytes", O_RDWR | O_CREAT, 0600);
    for (int i = 0; i < 40000; i++) {
        size_t n = next() % 700;
        off_t at = (off_t)(next() % 300000);
        struct iovec v[2] = {{block, n / 3}, {block + n, n - n / 3}};
        long done = 0;
        switch (i % 8) {
        case 0:
            done = pwrite(fd, block + n, n, at);
            break;
        case 1:
            done = lseek(fd, at, SEEK_SET) + write(fd, block, n);
            break;
        case 2:
            done = pwritev(fd, v, 2, at);
            break;
        case 3:
            done = writev(fd, v, 2);
            break;
        case 4:
            done = pwritev2(fd, v, 2, at, 0);
            break;
        case 5:
            done = i % 80 == 5 ? ftruncate(fd, at) : 0;
            break;
        case 6:
            done = i % 60 == 6 ? fallocate(fd, 0, at, (off_t)n + 1) : 0;
            break;
        default:
            done = i % 70 == 7 ? posix_fallocate(fd, at, 100) : 0;
        }
        if (done < 0)
            die("bytes");
        if (i % 4000 == 0)
            SAY(done);
    }
    SAY(fsync(fd));
    SAY(fdatasync(fd));
    SAY(fchmod(fd, 0644));
    SAY(fsetxattr(fd, "user.test", "value", 5, 0));

    /* Errors, and calls that do nothing. */
    SAY(write(-1, block, 10));
    SAY(write(fd, block, 0));
    SAY(pwrite(fd, block, 10, -5));
    SAY(ftruncate(fd, -1));
    SAY(open("none/none", O_CREAT | O_WRONLY, 0600));
    SAY(open("bytes", O_CREAT | O_EXCL | O_WRONLY, 0600));
    SAY(rename("none", "other"));
    SAY(unlink("none"));
    SAY(mkdir(".", 0700));
    SAY(close(-1));
    SAY(dup2(-1, 5));
    SAY(write(fd, nowhere, 10));
    SAY(truncate("none", 5));
    SAY(chmod("none", 0600));

    /* Copies inside the kernel. */
    int copy = open("copied", O_RDWR | O_CREAT | O_TRUNC, 0600);
    lseek(fd, 0, SEEK_SET);
    SAY(sendfile(copy, fd, NULL, 100000));
    off_t from = 1000, to = 200000;
    SAY(copy_file_range(fd, &from, copy, &to, 50000, 0));
    int ends[2];
    SAY(pipe2(ends, O_CLOEXEC));
    SAY(write(ends[1], block, 4000));
    SAY(splice(ends[0], NULL, copy, NULL, 4000, 0));
    struct iovec one = {block, 3000};
    SAY(vmsplice(ends[1], &one, 1, 0));
    SAY(splice(ends[0], NULL, copy, NULL, 3000, 0));
    close(ends[0]);
    close(ends[1]);
    close(copy);

    /* Names. */
    SAY(mkdir("dir", 0755));
    SAY(mkdir("dir", 0755));
    SAY(link("bytes", "dir/hard"));
    SAY(symlink("../bytes", "dir/soft"));
    SAY(mkfifo("dir/fifo", 0600));
    for (int i = 0; i < 300; i++) {
        char name[64], other[64];
        snprintf(name, sizeof name, "dir/n%d.tmp", i);
        snprintf(other, sizeof other, "dir/n%d", i % 100);
        int f = creat(name, 0644);
        if (f < 0 || write(f, block + i, (size_t)i) != i || close(f) != 0)
            die("names");
        if (rename(name, other) != 0)
            die("rename");
    }
    SAY(unlink("dir/n7"));
    SAY(remove("dir/n8"));
    SAY(renameat2(AT_FDCWD, "dir/n9", AT_FDCWD, "dir/n10", RENAME_EXCHANGE));
    SAY(truncate("dir/n11", 5000));
    SAY(chmod("dir/n12", 0400));
    SAY(rmdir("dir"));
    char unique[] = "uniqueXXXXXX";
    int u = mkstemp(unique);
    SAY(write(u, "x", 1));
    SAY(unlink(unique));
    close(u);

    /* Streams. */
    FILE *s = fopen("stream", "w");
    for (int i = 0; i < 20000; i++)
        fprintf(s, "line %d of a stream\n", i);
    SAY(fclose(s));
    s = fopen("stream", "a+");
    SAY(fputs("the end\n", s));
    SAY(fclose(s));
    s = popen("sort -r > sorted", "w");
    for (int i = 0; i < 1000; i++)
        fprintf(s, "%d\n", i);
    SAY(pclose(s));
    s = tmpfile();
    SAY(fputs("gone", s));
    SAY(fclose(s));

    /* A mapping. */
    char *map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    memset(map, 'm', 4096);
    SAY(msync(map, 4096, MS_SYNC));
    SAY(munmap(map, 4096));

    /* Threads and processes. */
    pthread_t id[4];
    for (int i = 0; i < 4; i++)
        pthread_create(&id[i], NULL, appender, (void *)(intptr_t)i);
    for (int i = 0; i < 4; i++)
        pthread_join(id[i], NULL);
    fflush(stdout);
    for (int i = 0; i < 50; i++) {
        pid_t pid = i % 2 ? fork() : vfork();
        if (pid == 0) {
            if (i % 2)
                dprintf(fd, "child %d\n", i);
            _exit(i);
        }
        int status;
        waitpid(pid, &status, 0);
        if (i % 10 == 0)
            SAY(WEXITSTATUS(status));
    }
    int duplicate = dup(fd);
    SAY(dup2(duplicate, 20));
    SAY(dup3(duplicate, 21, O_CLOEXEC));
    SAY(write(20, "20", 2));
    SAY(write(21, "21", 2));
    for (int i = 3; i < 100; i++)
        close(i);
    SAY(open("reused", O_WRONLY | O_CREAT, 0600));
    SAY(write(3, "first free descriptor\n", 22));
    return 0;
}
