/* writes COUNT PATH: COUNT one-byte writes to PATH. */
#include "common.h"

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    long count = number(argv[1]);
    int fd = open(argv[2], O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (fd < 0)
        die(argv[2]);
    for (long i = 0; i < count; i++)
        if (write(fd, "x", 1) != 1)
            die("write");
    return 0;
}
