/* check DIR: whether DIR/ledger and DIR/total, as counter.c writes them, could be
 * of one instant. Says what it finds; exits with 1 if they could not. */
#include <stdint.h>
#include <stdio.h>

enum { WORDS = 1 << 17 };

/* Reads exactly `count` words; 0 if there are more or fewer. */
static int words(const char *dir, const char *name, uint64_t *into, size_t count)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "rb");
    if (!f)
        return 0;
    size_t got = fread(into, sizeof *into, count, f);
    int more = fgetc(f) != EOF;
    fclose(f);
    return got == count && !more;
}

static int all_equal(const uint64_t *w, size_t count)
{
    for (size_t i = 1; i < count; i++)
        if (w[i] != w[0])
            return 0;
    return 1;
}

int main(int argc, char **argv)
{
    static uint64_t ledger[WORDS], total[8];
    if (argc != 2)
        return 2;
    if (!words(argv[1], "ledger", ledger, WORDS) || !words(argv[1], "total", total, 8)) {
        printf("a file is missing or cut short\n");
        return 1;
    }
    if (!all_equal(ledger, WORDS) || !all_equal(total, 8)) {
        printf("torn: the ledger holds %llu and %llu\n", (unsigned long long)ledger[0],
               (unsigned long long)ledger[WORDS - 1]);
        return 1;
    }
    /* The total follows the ledger: equal, or one behind between the two writes. */
    if (total[0] != ledger[0] && total[0] + 1 != ledger[0]) {
        printf("disagree: ledger %llu, total %llu\n", (unsigned long long)ledger[0],
               (unsigned long long)total[0]);
        return 1;
    }
    printf("consistent: ledger %llu, total %llu\n", (unsigned long long)ledger[0],
           (unsigned long long)total[0]);
    return 0;
}
