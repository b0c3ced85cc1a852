/* first_exit.c - from nothing to the first exit, with the ioctls that it takes. */
#include "raw.h"

int prepare(void)
{
    return raw_prepare();
}

/*
 * Nanoseconds from open("/dev/kvm") to the first exit; -errno, or -ENOEXEC if that is no OUT.
 * *whole: the same with everything closed again.
 */
int64_t first_exit(const struct raw_guest *guest, int64_t *whole)
{
    struct raw raw;
    int64_t start = now();
    int64_t result = raw_open(&raw, guest);
    if (!result && ioctl(raw.vcpu, KVM_RUN, 0) < 0)
        result = -errno;
    if (!result)
        result = raw.run->exit_reason == KVM_EXIT_IO ? now() - start : -ENOEXEC;
    raw_close(&raw);
    *whole = now() - start;
    return result;
}
