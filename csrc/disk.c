/*
 * disk.c - what Python's os module has not, of what a disk asks of its file: giving a range of it
 * back to the host, making a range zero without writing it, and a block device's limits.
 */
#define _GNU_SOURCE
#include "pykvm.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>

static int allocate(int fd, int mode, int64_t offset, int64_t length)
{
    while (fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, offset, length))
        if (errno != EINTR)
            return -errno;
    return 0;
}

int pykvm_file_punch(int fd, int64_t offset, int64_t length)
{
    return allocate(fd, FALLOC_FL_PUNCH_HOLE, offset, length);
}

int pykvm_file_zero(int fd, int64_t offset, int64_t length)
{
    return allocate(fd, FALLOC_FL_ZERO_RANGE, offset, length);
}

int pykvm_block_discard(int fd, int64_t offset, int64_t length)
{
    uint64_t range[2] = {(uint64_t)offset, (uint64_t)length};

    return ioctl(fd, BLKDISCARD, range) ? -errno : 0;
}

int pykvm_block_limits(int fd, struct pykvm_block_limits *limits)
{
    int logical = 0, alignment = 0;

    if (ioctl(fd, BLKGETSIZE64, &limits->size) || ioctl(fd, BLKSSZGET, &logical) ||
        ioctl(fd, BLKPBSZGET, &limits->physical) || ioctl(fd, BLKIOMIN, &limits->min_io) ||
        ioctl(fd, BLKIOOPT, &limits->opt_io) || ioctl(fd, BLKALIGNOFF, &alignment))
        return -errno;
    limits->logical = (uint32_t)logical;
    limits->alignment = alignment < 0 ? 0 : (uint32_t)alignment; /* -1: it is misaligned */
    return 0;
}
