// unwind FILE: threads cancelled in write() and pwrite(); the destructors of all their
// objects must have run.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

static std::atomic<long> made, destroyed, caught, started;
static int fd, pipe_ends[2];

struct Object {
    Object() { made++; }
    ~Object() { destroyed++; }
};

static void write_for_ever(bool blocks)
{
    Object inner;
    static char block[4096];
    try {
        for (;;)
            if ((blocks ? write(pipe_ends[1], block, sizeof block)
                        : pwrite(fd, block, sizeof block, 0)) < 0)
                abort();
    } catch (...) {
        caught++;
        throw;
    }
}

static void *body(void *blocks)
{
    Object outer;
    started++;
    write_for_ever(blocks != nullptr);
    return nullptr;
}

int main(int argc, char **argv)
{
    if (argc != 2 || (fd = open(argv[1], O_RDWR | O_CREAT, 0666)) < 0 || pipe(pipe_ends) != 0)
        return 2;
    alarm(100);
    fcntl(pipe_ends[1], F_SETFL, O_NONBLOCK);
    static char block[4096];
    while (write(pipe_ends[1], block, sizeof block) > 0)
        ;
    fcntl(pipe_ends[1], F_SETFL, 0);
    long cancelled = 0;
    for (int round = 0; round < 100; round++) {
        pthread_t threads[6];
        started = 0;
        for (int i = 0; i < 6; i++)
            if (pthread_create(threads + i, nullptr, body, i % 2 ? &fd : nullptr) != 0)
                return 3;
        while (started < 6)
            usleep(100);
        usleep(round * 37 % 1000);
        for (pthread_t thread : threads)
            pthread_cancel(thread);
        for (pthread_t thread : threads) {
            void *result;
            pthread_join(thread, &result);
            cancelled += result == PTHREAD_CANCELED;
        }
    }
    printf("%ld cancelled, %ld made, %ld destroyed, %ld caught\n", cancelled, made.load(),
           destroyed.load(), caught.load());
    return 0;
}
