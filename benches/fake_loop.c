/* fake_loop.c - the least that a loop around the fake KVM_RUN can do: enter, look, sum up. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <time.h>

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

/* `enter` is pykvm_fake_enter and `vcpu` what it takes: nanoseconds for `exits` exits, or -errno. */
int64_t fake_loop(int (*enter)(void *), void *vcpu, struct kvm_run *run, uint64_t exits,
                  uint64_t *sum)
{
    int64_t start = now();
    while (exits--) {
        int error = enter(vcpu);
        if (error)
            return error;
        switch (run->exit_reason) {
        case KVM_EXIT_IO:
            if (run->io.direction == KVM_EXIT_IO_OUT)
                *sum += *((uint8_t *)run + run->io.data_offset);
            break;
        default:
            return -ENOEXEC;
        }
    }
    return now() - start;
}
