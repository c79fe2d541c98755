/* mayfly PATH TIMES: writes to PATH, and executes itself with the file still open,
 * TIMES times; then ends with it open. */
#include "common.h"

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    long times = number(argv[2]);
    int fd = open(argv[1], O_WRONLY | O_CREAT, 0644);
    if (fd < 0)
        die(argv[1]);
    for (int i = 0; i < 20; i++)
        if (pwrite(fd, argv[2], 1, i) != 1)
            die("pwrite");
    char left[32];
    snprintf(left, sizeof left, "%ld", times - 1);
    if (times > 0) {
        execl("/proc/self/exe", argv[0], argv[1], left, (char *)NULL);
        die("exec");
    }
    return 0;
}
