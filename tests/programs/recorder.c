// Appends numbered lines to a file by way of stdio, never flushing, in one of the
// ways that stdio has: recorder FILE HOW COUNT. Lines have many lengths, so that
// libc's buffer runs over in the middle of nearly every one it ends with.
// With COUNT 0 it goes on until it is killed, with short rests, and begins its file anew
// after 20,000 lines.
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <wchar.h>

static void with_list(FILE *file, const char *format, ...) {
    va_list list;
    va_start(list, format);
    vfprintf(file, format, list);
    va_end(list);
}

int main(int argc, char **argv) {
    if (argc != 4)
        return 2;
    const char *how = argv[2];
    long count = atol(argv[3]);
    FILE *file = strcmp(how, "printf") && strcmp(how, "puts") && strcmp(how, "putchar")
                     ? fopen(argv[1], "w")
                     : freopen(argv[1], "w", stdout);
    if (!file)
        return 1;
    for (long n = 0; count == 0 || n < count; n++) {
        if (count == 0 && n == 20000 && file != stdout) {
            if (fclose(file) || !(file = fopen(argv[1], "w")))
                return 1;
            n = 0;
        }
        char line[512], filler[400];
        int length = (int)(n * 37 % 389);
        memset(filler, 'a' + (int)(n % 26), sizeof filler);
        int size = snprintf(line, sizeof line, "%010ld %03d %.*s .", n, length, length, filler);
        line[size] = '\n';
        line[size + 1] = 0;
        if (!strcmp(how, "fprintf"))
            fprintf(file, "%010ld %03d %.*s%s", n, length, length, filler, " .\n");
        else if (!strcmp(how, "floats"))
            // Vector registers and the stack carry arguments as well.
            fprintf(file, "%010.0f %03d %.*s%c%c%c", (double)n, length, length, filler, ' ', '.', '\n');
        else if (!strcmp(how, "printf"))
            printf("%010ld %03d %.*s .\n", n, length, length, filler);
        else if (!strcmp(how, "vfprintf"))
            with_list(file, "%010ld %03d %.*s .\n", n, length, length, filler);
        else if (!strcmp(how, "fwrite"))
            fwrite(line, 1, (size_t)size + 1, file);
        else if (!strcmp(how, "fputs"))
            fputs(line, file);
        else if (!strcmp(how, "puts"))
            line[size] = 0, puts(line);
        else if (!strcmp(how, "fwprintf"))
            fwprintf(file, L"%010ld %03d %.*s .\n", n, length, length, filler);
        else
            return 2;
        if (count == 0 && n % 4 == 0)
            usleep(200);
    }
    return fclose(file) != 0;
}
