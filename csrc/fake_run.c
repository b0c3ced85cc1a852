/* fake_run.c - KVM_RUN from a script: the whole loop without /dev/kvm, for tests and benches. */
#include "pykvm.h"

#include <errno.h>
#include <signal.h>
#include <string.h>

#define FAKE_DATA_OFFSET 4096 /* the page behind kvm_run, as KVM has it */

static uint8_t *data_of(struct kvm_run *run, uint32_t reason)
{
    return reason == KVM_EXIT_MMIO ? run->mmio.data : (uint8_t *)run + FAKE_DATA_OFFSET;
}

static uint32_t bytes_of(const struct pykvm_fake_exit *exit)
{
    uint32_t bytes = exit->size * (exit->reason == KVM_EXIT_IO ? exit->count : 1);
    uint32_t room = exit->reason == KVM_EXIT_IO ? sizeof exit->data : 8;
    return bytes < room ? bytes : room;
}

int pykvm_fake_enter(struct pykvm_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    struct pykvm_fake *fake = vcpu->fake;

    if (fake->last && !fake->last->is_write) /* KVM completes a read on re-entry: note its answer */
        memcpy(fake->last->data, data_of(run, fake->last->reason), bytes_of(fake->last));
    fake->last = NULL;
    if (__atomic_load_n(&run->immediate_exit, __ATOMIC_SEQ_CST))
        return -EINTR;

    struct pykvm_fake_exit *exit = &fake->script[fake->next];
    if (++fake->next >= fake->count)
        fake->next = 0;
    if (exit->stop)
        pykvm_vcpu_stop(vcpu);
    if (exit->signal)
        raise(exit->signal);
    run->exit_reason = exit->reason;
    if (exit->error)
        return -exit->error;
    switch (exit->reason) {
    case KVM_EXIT_IO:
        run->io.port = (uint16_t)exit->address;
        run->io.size = exit->size;
        run->io.count = exit->count;
        run->io.direction = exit->is_write ? KVM_EXIT_IO_OUT : KVM_EXIT_IO_IN;
        run->io.data_offset = FAKE_DATA_OFFSET;
        break;
    case KVM_EXIT_MMIO:
        run->mmio.phys_addr = exit->address;
        run->mmio.len = exit->size;
        run->mmio.is_write = exit->is_write;
        break;
    default:
        return 0;
    }
    if (exit->is_write)
        memcpy(data_of(run, exit->reason), exit->data, bytes_of(exit));
    fake->last = exit;
    return 0;
}
