/* ops MODE PATH THREADS COUNT FIRST_CPU: the cost of one call.
 *
 * MODE null: one byte to /dev/null; block: 4 KiB with pwrite over the same place
 * of a file. Each thread is pinned to a CPU and has its own descriptor. Prints the
 * time of a call, ns: the median of batches of 2,000, so that what else runs on
 * the machine spoils only those it hits, and the mean over the threads. */
#include "common.h"
#include <pthread.h>
#include <sched.h>

enum { BATCH = 2000 };

static long batches;
static int is_block;
static const char *path;
static int first_cpu;
static pthread_barrier_t barrier;

static double medians[64];

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void *run(void *arg)
{
    static char block[4096];
    int index = (int)(intptr_t)arg;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((first_cpu + index) % (int)sysconf(_SC_NPROCESSORS_ONLN), &set);
    sched_setaffinity(0, sizeof set, &set);
    char name[4096];
    snprintf(name, sizeof name, is_block ? "%s.%d" : "%s", path, index);
    int fd = open(name, O_WRONLY | (is_block ? O_CREAT : 0), 0600);
    if (fd < 0)
        die(name);
    long failed = 0;
    pthread_barrier_wait(&barrier);
    for (int warm = 0; warm < 1000; warm++)
        failed += write(fd, block, 0) != 0;
    double *took = calloc((size_t)batches, sizeof *took);
    if (!took)
        die("calloc");
    for (long b = 0; b < batches; b++) {
        uint64_t start = now_ns();
        if (is_block)
            for (long i = 0; i < BATCH; i++)
                failed += pwrite(fd, block, sizeof block, 0) != sizeof block;
        else
            for (long i = 0; i < BATCH; i++)
                failed += write(fd, block, 1) != 1;
        took[b] = (double)(now_ns() - start) / BATCH;
    }
    if (failed)
        die("write");
    qsort(took, (size_t)batches, sizeof *took, by_value);
    medians[index] = took[batches / 2];
    free(took);
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc != 6)
        return 2;
    is_block = !strcmp(argv[1], "block");
    path = argv[2];
    int threads = (int)number(argv[3]);
    batches = number(argv[4]) / BATCH;
    first_cpu = (int)number(argv[5]);
    pthread_t id[64];
    if (threads < 1 || threads > 64 || batches < 1)
        return 2;
    pthread_barrier_init(&barrier, NULL, (unsigned)threads);
    double sum = 0;
    // One thread: the first, in a process that never had another.
    for (int t = 1; t < threads; t++)
        pthread_create(&id[t], NULL, run, (void *)(intptr_t)t);
    run((void *)0);
    sum += medians[0];
    for (int t = 1; t < threads; t++) {
        pthread_join(id[t], NULL);
        sum += medians[t];
    }
    printf("%.3f\n", sum / threads);
    return 0;
}
