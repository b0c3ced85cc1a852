/* ioctl.c - one ioctl, its errno in the result: no window in which errno could be lost. */
#include "pykvm.h"

#include <errno.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

int64_t pykvm_ioctl(int fd, unsigned long request, void *arg)
{
    int result = ioctl(fd, request, arg);
    return result < 0 ? -(int64_t)errno : result;
}

struct kvm_run *pykvm_run_map(int fd, uint64_t size)
{
    void *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return run == MAP_FAILED ? NULL : run;
}

void pykvm_run_unmap(struct kvm_run *run, uint64_t size)
{
    munmap(run, size);
}
