/* first_exit.c - from nothing (or a file of memory) to the first exit, with the ioctls it takes. */
#include "raw.h"

int prepare(void)
{
    return raw_prepare();
}

/*
 * Nanoseconds from open("/dev/kvm") to the first exit; -errno, or -ENOEXEC if that is neither OUT
 * nor HLT.
 * *whole: the same with everything closed again.
 */
int64_t first_exit(const struct raw_guest *guest, int64_t *whole)
{
    struct raw raw;
    int64_t start = now();
    int64_t result = raw_open(&raw, guest);
    if (!result && ioctl(raw.vcpu, KVM_RUN, 0) < 0)
        result = -errno;
    if (!result) {
        uint32_t reason = raw.run->exit_reason;
        result = reason == KVM_EXIT_IO || reason == KVM_EXIT_HLT ? now() - start : -ENOEXEC;
    }
    raw_close(&raw);
    *whole = now() - start;
    return result;
}
