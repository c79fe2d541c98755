/* ordered DIR FILES THREADS PROCESSES RECORD_BYTES PACE_US SECONDS
 *
 * Writes ordered records (lanes.h) from several threads of several processes
 * until SIGTERM, or for SECONDS. Prints how many, and the longest call. */
#include "lanes.h"
#include <pthread.h>
#include <sys/wait.h>

static struct lanes l;
static int *shared;

static void *thread(void *lane)
{
    lane_run(&l, (int)(intptr_t)lane, shared);
    return NULL;
}

static void run_process(int process, int threads)
{
    pthread_t id[256];
    if (l.files > 16)
        shared = lanes_open(&l);
    for (int t = 1; t < threads; t++)
        if (pthread_create(&id[t], NULL, thread, (void *)(intptr_t)(process * threads + t)))
            die("pthread_create");
    thread((void *)(intptr_t)(process * threads));
    for (int t = 1; t < threads; t++)
        pthread_join(id[t], NULL);
}

int main(int argc, char **argv)
{
    if (argc != 8) {
        fprintf(stderr, "usage: %s DIR FILES THREADS PROCESSES RECORD PACE_US SECONDS\n", argv[0]);
        return 2;
    }
    int threads = (int)number(argv[3]), processes = (int)number(argv[4]);
    l.dir = argv[1];
    l.files = (int)number(argv[2]);
    l.lanes = threads * processes;
    l.record = (size_t)number(argv[5]);
    l.pace_us = number(argv[6]);
    unsigned seconds = (unsigned)number(argv[7]);
    if (threads < 1 || threads > 256 || l.record < 64 || l.record % 8)
        return 2;
    stats_open();
    lanes_create(&l);
    struct sigaction term = {.sa_handler = lanes_on_term, .sa_flags = SA_RESTART};
    sigaction(SIGTERM, &term, NULL);
    sigaction(SIGALRM, &term, NULL);
    end_in_time(seconds);
    for (int p = 1; p < processes; p++) {
        pid_t pid = fork();
        if (pid < 0)
            die("fork");
        if (pid == 0) {
            end_in_time(seconds);
            run_process(p, threads);
            return 0;
        }
    }
    run_process(0, threads);
    int failed = 0, status;
    while (wait(&status) > 0)
        failed |= status != 0;
    printf("records %llu longest_us %llu\n", (unsigned long long)stats->beats,
           (unsigned long long)(stats->longest_ns / 1000));
    return failed;
}
