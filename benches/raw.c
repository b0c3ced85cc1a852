/* raw.c - a guest that lives, and the raw loop around it: the reference for what an exit costs. */
#include "raw.h"

struct raw *raw_new(const struct raw_guest *guest, int *error)
{
    struct raw *raw = malloc(sizeof *raw);
    if (!raw) {
        *error = ENOMEM;
        return NULL;
    }
    *raw = (struct raw){.kvm = -1, .vm = -1, .vcpu = -1};
    *error = -raw_prepare();
    if (!*error)
        *error = -raw_open(raw, guest);
    if (!*error)
        return raw;
    raw_close(raw);
    free(raw);
    return NULL;
}

void raw_delete(struct raw *raw)
{
    raw_close(raw);
    free(raw);
}

/* The loop of every KVM tutorial, `exits` times: nanoseconds, or -errno (-ENOEXEC: another exit). */
int64_t raw_run(struct raw *raw, uint64_t exits)
{
    struct kvm_run *run = raw->run;
    int64_t start = now();
    while (exits--) {
        if (ioctl(raw->vcpu, KVM_RUN, 0) < 0)
            return -errno;
        switch (run->exit_reason) {
        case KVM_EXIT_IO:
            if (run->io.direction == KVM_EXIT_IO_OUT)
                raw->sum += *((uint8_t *)run + run->io.data_offset);
            break;
        case KVM_EXIT_MMIO:
            if (run->mmio.is_write)
                raw->sum += run->mmio.data[0];
            break;
        default:
            return -ENOEXEC;
        }
    }
    return now() - start;
}

uint64_t raw_sum(const struct raw *raw)
{
    return raw->sum;
}

int raw_vcpu_fd(const struct raw *raw)
{
    return raw->vcpu;
}

uint64_t raw_run_size(const struct raw *raw)
{
    return raw->run_size;
}
