/* vcpu_loop.c - the vCPU loop: KVM_RUN until Python is needed. */
#include "pykvm.h"

#include <errno.h>
#include <sys/ioctl.h>

/* Have KVM take over the registers that were changed in the run page. */
static int write_back(struct pykvm_vcpu *vcpu, uint64_t which)
{
    struct kvm_run *run = vcpu->run;
    if (run->kvm_dirty_regs & which & KVM_SYNC_X86_REGS) {
        if (ioctl(vcpu->fd, KVM_SET_REGS, &run->s.regs.regs) < 0)
            return -errno;
        run->kvm_dirty_regs &= ~(uint64_t)KVM_SYNC_X86_REGS;
    }
    if (run->kvm_dirty_regs & which & KVM_SYNC_X86_SREGS) {
        if (ioctl(vcpu->fd, KVM_SET_SREGS, &run->s.regs.sregs) < 0)
            return -errno;
        run->kvm_dirty_regs &= ~(uint64_t)KVM_SYNC_X86_SREGS;
    }
    return 0;
}

static int fetch(struct pykvm_vcpu *vcpu, uint64_t wanted)
{
    struct kvm_run *run = vcpu->run;
    if (wanted & KVM_SYNC_X86_REGS && ioctl(vcpu->fd, KVM_GET_REGS, &run->s.regs.regs) < 0)
        return -errno;
    if (wanted & KVM_SYNC_X86_SREGS && ioctl(vcpu->fd, KVM_GET_SREGS, &run->s.regs.sregs) < 0)
        return -errno;
    return 0;
}

/* For a KVM that lacks KVM_CAP_SYNC_REGS: what it would do on exit, by ioctls. */
static int enter_without_sync(struct pykvm_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    uint64_t wanted = run->kvm_valid_regs;
    int error = write_back(vcpu, KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS);
    if (error)
        return error;
    run->kvm_valid_regs = 0; /* KVM_RUN refuses bits that it does not know */
    error = ioctl(vcpu->fd, KVM_RUN, 0) < 0 ? -errno : 0;
    run->kvm_valid_regs = wanted;
    int fetched = wanted ? fetch(vcpu, wanted) : 0;
    return error ? error : fetched;
}

int pykvm_vcpu_enter(struct pykvm_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    /* Without a local APIC, KVM takes CR8 from here, after it has taken over SREGS (api.rst, 5.). */
    if (run->kvm_dirty_regs & KVM_SYNC_X86_SREGS)
        run->cr8 = run->s.regs.sregs.cr8;
    if (!vcpu->sync_regs)
        return enter_without_sync(vcpu);
    if (!(run->kvm_dirty_regs & KVM_SYNC_X86_SREGS))
        return ioctl(vcpu->fd, KVM_RUN, 0) < 0 ? -errno : 0;
    /* KVM puts the old SREGS over those that it refuses: nobody could say what was wrong with
       them. (EINVAL with the bit still set: that was it.) */
    struct kvm_sregs wanted = run->s.regs.sregs;
    if (ioctl(vcpu->fd, KVM_RUN, 0) == 0)
        return 0;
    int error = errno;
    if (error == EINVAL && run->kvm_dirty_regs & KVM_SYNC_X86_SREGS)
        run->s.regs.sregs = wanted;
    return -error;
}

static void take_pio(struct pykvm_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    struct pykvm_access *access = &vcpu->access;
    access->address = run->io.port;
    access->data = (uint8_t *)run + run->io.data_offset;
    access->count = run->io.count;
    access->size = run->io.size;
    access->is_write = run->io.direction == KVM_EXIT_IO_OUT;
    access->is_mmio = 0;
    access->index = 0;
}

static void take_mmio(struct pykvm_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    struct pykvm_access *access = &vcpu->access;
    access->address = run->mmio.phys_addr;
    access->data = run->mmio.data;
    access->count = 1;
    access->size = (uint8_t)run->mmio.len;
    access->is_write = run->mmio.is_write;
    access->is_mmio = 1;
    access->index = 0;
}

/* An exit that is no access: Python's, which may also give it back (PYKVM_UNSERVED). */
static int64_t hand(struct pykvm_vcpu *vcpu, int64_t outcome)
{
    vcpu->error = 0;
    vcpu->access.pending = PYKVM_HANDED;
    return outcome;
}

/* Replaying, an exit is the log's to answer, but for a debugger's stops, which are in no log. */
static int64_t replayed(struct pykvm_vcpu *vcpu, int64_t result)
{
    if (result == PYKVM_DIVERGED && vcpu->run->exit_reason == KVM_EXIT_DEBUG)
        return hand(vcpu, PYKVM_EXIT);
    return result == PYKVM_SERVED ? result : hand(vcpu, result);
}

/* Serve the exit that KVM_RUN just made: PYKVM_SERVED, or what to return. */
static int64_t serve(struct pykvm_vcpu *vcpu)
{
    if (vcpu->run->exit_reason == KVM_EXIT_IO) {
        const struct pykvm_planted *planted = __atomic_load_n(&vcpu->planted, __ATOMIC_ACQUIRE);
        if (planted && !vcpu->guests_own && pykvm_may_be_planted(vcpu->run, planted))
            return hand(vcpu, PYKVM_STRUCK);
        vcpu->guests_own = 0;
    }
    if (vcpu->log && vcpu->log->mode == PYKVM_LOG_REPLAY)
        return replayed(vcpu, pykvm_log_replay(vcpu, vcpu->log));
    switch (vcpu->run->exit_reason) {
    case KVM_EXIT_IO:
        take_pio(vcpu);
        return pykvm_bus_serve(vcpu);
    case KVM_EXIT_MMIO:
        take_mmio(vcpu);
        return pykvm_bus_serve(vcpu);
    default:
        return hand(vcpu, PYKVM_EXIT);
    }
}

/* KVM_RUN returned an error: PYKVM_SERVED to try again, or what to return. */
static int64_t failed(struct pykvm_vcpu *vcpu, int error)
{
    switch (error) {
    case EINTR:
        /* Cleared before the reasons are read: a stop from now on sets it again. */
        __atomic_store_n(&vcpu->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
        if (__atomic_exchange_n(&vcpu->stop, 0, __ATOMIC_SEQ_CST))
            return PYKVM_KICKED;
        if (pykvm_now() >= vcpu->deadline)
            return PYKVM_TIMEOUT;
        if (vcpu->tid)
            pykvm_kick_arm(vcpu);
        return PYKVM_INTERRUPTED;
    case EAGAIN: /* a vCPU that waited for its start-up IPI was woken */
        return PYKVM_SERVED;
    default:
        vcpu->error = error;
        if (vcpu->run->exit_reason == KVM_EXIT_MEMORY_FAULT && error == EFAULT) {
            vcpu->access.pending = PYKVM_HANDED;
            return PYKVM_EXIT;
        }
        return PYKVM_FAILED;
    }
}

int64_t pykvm_vcpu_answer(struct pykvm_vcpu *vcpu, uint64_t answer)
{
    struct pykvm_access *access = &vcpu->access;
    int64_t result = PYKVM_SERVED;

    switch (access->pending) {
    case PYKVM_UNANSWERED:
    case PYKVM_ASKED:
        pykvm_bus_answer(vcpu, answer);
        if (access->index < access->count) { /* the other items of a string instruction */
            /* They may be thousands: a stop or the deadline does not wait for them.  A stop by
               their own handler does: after the run the instruction is complete then. */
            if (__atomic_load_n(&vcpu->run->immediate_exit, __ATOMIC_SEQ_CST) &&
                __atomic_load_n(&vcpu->stop, __ATOMIC_SEQ_CST) != PYKVM_STOP_OWN) {
                access->pending = PYKVM_RETRY;
                return failed(vcpu, EINTR);
            }
            result = pykvm_bus_serve(vcpu);
        }
        break;
    case PYKVM_RETRY:
        result = pykvm_bus_serve(vcpu);
        break;
    case PYKVM_HANDED:
    case PYKVM_SEEN:
        access->pending = PYKVM_IDLE;
        break;
    case PYKVM_UNSERVED:
        access->pending = PYKVM_IDLE;
        result = vcpu->error ? failed(vcpu, vcpu->error) : serve(vcpu);
        break;
    }

    while (result == PYKVM_SERVED) {
        if (vcpu->exits >= vcpu->exit_limit)
            return PYKVM_LIMIT;
        struct pykvm_log *log = vcpu->log;
        if (log && (result = pykvm_log_enter(vcpu, log)) != PYKVM_SERVED)
            return result;
        vcpu->entries++;
        if (vcpu->planted) /* every exit may be one of them: with the registers, then */
            vcpu->run->kvm_valid_regs |= KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
        struct pykvm_events *events = __atomic_load_n(&vcpu->events, __ATOMIC_ACQUIRE);
        if (events)
            pykvm_events_enter(vcpu, events);
        int at_once = log && __atomic_load_n(&vcpu->run->immediate_exit, __ATOMIC_SEQ_CST);
        int error = -vcpu->enter(vcpu);
        if (!error) {
            vcpu->exits++;
            if (events)
                pykvm_events_exit(vcpu, events);
            if (log)
                pykvm_log_exit(vcpu, log);
        } else if (log) {
            pykvm_log_interrupted(log, at_once);
        }
        if (vcpu->trace) {
            vcpu->error = error;
            access->pending = PYKVM_UNSERVED;
            return PYKVM_TRACED;
        }
        result = error ? failed(vcpu, error) : serve(vcpu);
    }
    return result;
}

int64_t pykvm_vcpu_run(struct pykvm_vcpu *vcpu)
{
    return pykvm_vcpu_answer(vcpu, PYKVM_ALL_ONES);
}
