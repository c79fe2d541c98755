/* With -DCOPY=N, a library that brings its own io_uring_submit, which answers N.
 *
 * Without, copies LIBRARY LIBRARY TIMES: loads both, none for the other to see,
 * calls into each, and unloads them, again and again. The first answers 1, the
 * second 2. */
#ifdef COPY
int io_uring_submit(void *ring);
int call(void *ring);

int io_uring_submit(void *ring)
{
    return ring ? COPY : 0;
}

/* Through the symbol, which another library may take the place of. */
int call(void *ring)
{
    return io_uring_submit(ring);
}
#else
#include "common.h"
#include <dlfcn.h>

static void *load(const char *path, int expected)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    int (*call)(void *) = library ? (int (*)(void *))dlsym(library, "call") : NULL;
    if (!call) {
        fprintf(stderr, "%s\n", dlerror());
        exit(3);
    }
    int answer = call(&answer);
    if (answer != expected) {
        fprintf(stderr, "copy %d answered for copy %d\n", answer, expected);
        exit(1);
    }
    return library;
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    end_in_time(60);
    for (long i = number(argv[3]); i > 0; i--) {
        /* In turn, so that each comes where the other was. */
        int first = 1 + (int)(i % 2);
        void *a = load(argv[first], first);
        void *b = load(argv[3 - first], 3 - first);
        dlclose(a);
        a = load(argv[first], first);
        dlclose(b);
        dlclose(a);
    }
    puts("each its own");
    return 0;
}
#endif
