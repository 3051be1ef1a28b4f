/* Writes one frame again and again, and prints how many nanoseconds each write took on average.
 *
 * Usage: frames FD COUNT <FRAME. FD is an inherited tap's or packet socket's. A write that the kernel refuses for want
 * of room (ENOBUFS) counts: a shaped port has no room for most of them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static long long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (long long)t.tv_sec * 1000000000 + t.tv_nsec;
}

int main(int argc, char **argv)
{
    static char frame[65536];
    if (argc != 3)
        return 2;
    ssize_t length = read(0, frame, sizeof frame);
    int fd = atoi(argv[1]);
    long count = atol(argv[2]);
    if (length <= 0 || count <= 0)
        return 2;
    long long begin = now();
    for (long i = 0; i < count; i++)
        if (write(fd, frame, (size_t)length) < 0 && errno != ENOBUFS)
            return 1;
    return printf("%lld\n", (now() - begin) / count) < 0;
}
