/* hold MODE PATH: has PATH open, or mapped, for reading or writing, and waits.
 *
 * MODE: reads, writes, mapped (for writing, the descriptor closed), mapped-read,
 * locked (a write lock on all of it). Says "ready". */
#include "common.h"

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    const char *mode = argv[1];
    end_in_time(0);
    int reads = !strcmp(mode, "reads") || !strcmp(mode, "mapped-read");
    int fd = open(argv[2], reads ? O_RDONLY : O_RDWR);
    if (fd < 0)
        die(argv[2]);
    if (!strncmp(mode, "mapped", 6)) {
        int protection = reads ? PROT_READ : PROT_READ | PROT_WRITE;
        if (mmap(NULL, 4096, protection, MAP_SHARED, fd, 0) == MAP_FAILED)
            die("mmap");
        close(fd);
    } else if (!strcmp(mode, "locked")) {
        struct flock all = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
        if (fcntl(fd, F_SETLK, &all) != 0)
            die("F_SETLK");
    }
    puts("ready");
    fflush(stdout);
    for (;;)
        pause();
}
