/* ioctl.c - one ioctl, its errno in the result: no window in which errno could be lost. */
#include "pykvm.h"

#include <errno.h>
#include <sys/ioctl.h>

int64_t pykvm_ioctl(int fd, unsigned long request, void *arg)
{
    int result = ioctl(fd, request, arg);
    return result < 0 ? -(int64_t)errno : result;
}
