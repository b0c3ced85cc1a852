/* fuzz.c - input after input: write it, run, note how it ended, put everything back. */
#include "pykvm.h"

#include <errno.h>
#include <string.h>

enum { PAGE = 4096 };

/* Devices' threads may mark pages at the same time. */
static void touch(struct pykvm_reset_slot *slot, uint64_t at, uint64_t length)
{
    if (length)
        pykvm_pages_mark(slot->touched, at / PAGE, (at + length - 1) / PAGE - at / PAGE + 1);
}

static uint64_t stateful_hits(const struct pykvm_fuzz *fuzz)
{
    uint64_t hits = 0;
    for (uint32_t i = 0; i < fuzz->stateful_count; i++)
        hits += fuzz->stateful[i]->hits;
    return hits;
}

static void begin(struct pykvm_fuzz *fuzz)
{
    uint32_t which = fuzz->next;
    uint64_t first = which ? fuzz->ends[which - 1] : 0;
    uint64_t length = fuzz->ends[which] - first; /* Python has seen that it fits */
    memcpy(fuzz->to, fuzz->inputs + first, length);
    touch(fuzz->slot, fuzz->at, length);
    if (fuzz->length_to) {
        memcpy(fuzz->length_to, &length, sizeof length);
        touch(fuzz->length_slot, fuzz->length_at, sizeof length);
    }
    fuzz->stateful_hits = stateful_hits(fuzz);
    struct pykvm_vcpu *vcpu = fuzz->vcpu;
    struct pykvm_outcome_record *record = &fuzz->outcomes[which];
    record->exits = vcpu->exits;
    vcpu->exit_limit = fuzz->exit_limit > UINT64_MAX - vcpu->exits ? UINT64_MAX
                                                                  : vcpu->exits + fuzz->exit_limit;
    /* The timer stays as it is: it goes off too early for this input, and is set anew then. */
    vcpu->deadline = fuzz->timeout ? pykvm_now() + fuzz->timeout : INT64_MAX;
    vcpu->run->kvm_valid_regs = KVM_SYNC_X86_REGS;
    if (vcpu->sync_regs)
        vcpu->run->kvm_valid_regs |= fuzz->reset->vcpus[0].seen;
    if (fuzz->rearm && vcpu->tid)
        pykvm_kick_arm(vcpu);
    fuzz->rearm = 0;
    fuzz->running = 1;
}

/* Cells with a bit that no run before had; from now on they are known. */
static uint32_t fresh(struct pykvm_fuzz *fuzz)
{
    uint32_t count = 0;
    uint64_t at = 0;
    for (; at + 8 <= fuzz->map_size; at += 8) {
        uint64_t now, known;
        memcpy(&now, fuzz->map + at, 8);
        memcpy(&known, fuzz->known + at, 8);
        if (!(now & ~known))
            continue;
        for (int i = 0; i < 8; i++)
            count += (fuzz->map[at + i] & ~fuzz->known[at + i]) != 0;
        known |= now;
        memcpy(fuzz->known + at, &known, 8);
    }
    for (; at < fuzz->map_size; at++) {
        count += (fuzz->map[at] & ~fuzz->known[at]) != 0;
        fuzz->known[at] |= fuzz->map[at];
    }
    return count;
}

int pykvm_fuzz_end(struct pykvm_fuzz *fuzz, int64_t outcome)
{
    struct pykvm_vcpu *vcpu = fuzz->vcpu;
    struct pykvm_outcome_record *record = &fuzz->outcomes[fuzz->next];
    record->outcome = outcome;
    record->rip = vcpu->run->s.regs.regs.rip;
    record->exits = vcpu->exits - record->exits;
    record->reason = outcome == PYKVM_EXIT ? vcpu->run->exit_reason : 0;
    record->value = record->address = 0;
    if (outcome == PYKVM_STOPPED || outcome == PYKVM_UNCLAIMED) {
        record->value = vcpu->access.value;
        record->address = vcpu->access.address;
    }
    record->fresh = fuzz->map ? fresh(fuzz) : 0;
    fuzz->running = 0;
    fuzz->rearm = outcome == PYKVM_TIMEOUT; /* that was the timer's last shot */
    fuzz->next++;
    uint32_t calls = fuzz->reset->call_count;
    if (calls > fuzz->calls)
        fuzz->reset->call_count = fuzz->calls;
    int error = pykvm_reset(fuzz->reset);
    fuzz->reset->call_count = calls;
    return error;
}

/* Whether nobody but us needs to look at how it ended. */
static int is_over(const struct pykvm_fuzz *fuzz, int64_t outcome)
{
    const struct kvm_run *run = fuzz->vcpu->run;
    if (fuzz->hooked & 4)
        return 0;
    switch (outcome) {
    case PYKVM_STOPPED:
    case PYKVM_UNCLAIMED:
    case PYKVM_LIMIT:
    case PYKVM_TIMEOUT:
        return 1;
    case PYKVM_EXIT:
        return (run->exit_reason == KVM_EXIT_HLT && !(fuzz->hooked & 1)) ||
               (run->exit_reason == KVM_EXIT_SHUTDOWN && !(fuzz->hooked & 2));
    default:
        return 0;
    }
}

int64_t pykvm_fuzz_run(struct pykvm_fuzz *fuzz, uint64_t answer, int32_t *error)
{
    *error = 0;
    while (fuzz->next < fuzz->count) {
        if (!fuzz->running)
            begin(fuzz);
        int64_t outcome = pykvm_vcpu_answer(fuzz->vcpu, answer);
        answer = PYKVM_ALL_ONES;
        if (!is_over(fuzz, outcome))
            return outcome;
        *error = pykvm_fuzz_end(fuzz, outcome);
        if (*error)
            return PYKVM_FUZZ_FAILED;
        if (stateful_hits(fuzz) != fuzz->stateful_hits)
            return PYKVM_FUZZ_DEVICES;
    }
    return PYKVM_FUZZ_DONE;
}
