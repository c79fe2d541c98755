/* dbm gdbm FILE N: see paths.c. */
#include <gdbm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    long count = atol(argv[3]);
    pid_t parent = getppid();
    alarm(120);
    GDBM_FILE db = gdbm_open(argv[2], 0, GDBM_NEWDB, 0644, NULL);
    if (!db)
        return 3;
    long i = 1;
    for (; count == 0 || i <= count; i++) {
        char key[32], value[64];
        snprintf(key, sizeof key, "key %ld", i % 100);
        snprintf(value, sizeof value, "value %ld", i);
        datum k = {key, (int)strlen(key)}, v = {value, (int)strlen(value)};
        if (gdbm_store(db, k, v, GDBM_REPLACE) != 0)
            return 4;
        if (count == 0) {
            struct timespec pace = {0, 300000};
            nanosleep(&pace, NULL);
            if (getppid() != parent)
                break;
        }
    }
    gdbm_close(db);
    fprintf(stderr, "gdbm: %ld records\n", i - 1);
    return 0;
}
