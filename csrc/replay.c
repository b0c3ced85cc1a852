/*
 * replay.c - an input log: at every exit what the guest said is written down, and at the next entry
 * what it was answered.  Replaying, the exits are compared with the log and answered from it; no
 * handler and no device is asked.
 *
 * What was given to the guest without an exit, between two, is a record of its own: registers that
 * stand in the run page here, memory and ioctls by Python.
 */
#include "pykvm.h"

#include <errno.h>
#include <string.h>

enum { HEAD = sizeof(struct pykvm_log_record), PAGE = 4096 };
_Static_assert(HEAD == 32, "records are compared whole");

struct piece {
    uint8_t *at;
    uint32_t bytes;
};

static uint64_t padded(uint64_t bytes)
{
    return (bytes + 7) & ~UINT64_C(7);
}

/* ---- an exit as the log has it --------------------------------------------------------------- */

/* The exit in the run page: its record, what the guest said, and where it is answered. */
static struct pykvm_log_record describe(struct kvm_run *run, struct piece *said,
                                        struct piece *answer)
{
    struct pykvm_log_record it = {.kind = PYKVM_LOG_EXIT, .count = 1};
    struct piece data = {0};
    it.reason = (uint16_t)(run->exit_reason < UINT16_MAX ? run->exit_reason : UINT16_MAX);
    *said = *answer = data;
    switch (run->exit_reason) {
    case KVM_EXIT_IO:
        it.address = run->io.port;
        it.size = run->io.size;
        it.count = (uint16_t)run->io.count;
        it.is_write = run->io.direction == KVM_EXIT_IO_OUT;
        data.at = (uint8_t *)run + run->io.data_offset;
        data.bytes = run->io.size * run->io.count;
        if (data.bytes > PAGE) /* KVM has no more room either */
            data.bytes = PAGE;
        break;
    case KVM_EXIT_MMIO:
        it.address = run->mmio.phys_addr;
        it.size = (uint8_t)run->mmio.len;
        it.is_write = run->mmio.is_write;
        data.at = run->mmio.data;
        data.bytes = it.size < sizeof run->mmio.data ? it.size : sizeof run->mmio.data;
        break;
    case KVM_EXIT_X86_RDMSR:
    case KVM_EXIT_X86_WRMSR:
        it.address = run->msr.index;
        it.size = sizeof run->msr.data;
        it.is_write = run->exit_reason == KVM_EXIT_X86_WRMSR;
        if (it.is_write)
            *said = (struct piece){(uint8_t *)&run->msr.data, sizeof run->msr.data};
        *answer = (struct piece){(uint8_t *)&run->msr, sizeof run->msr}; /* also whether it is #GP */
        return it;
    case KVM_EXIT_HYPERCALL:
        it.address = run->hypercall.nr;
        *said = (struct piece){(uint8_t *)run->hypercall.args, sizeof run->hypercall.args};
        *answer = (struct piece){(uint8_t *)&run->hypercall.ret, sizeof run->hypercall.ret};
        return it;
    }
    *(it.is_write ? said : answer) = data;
    return it;
}

static void append(struct pykvm_log *log, const struct pykvm_log_record *record, const void *said)
{
    uint8_t *to = log->bytes + log->end;
    memset(to, 0, HEAD + padded(record->said) + padded(record->answered));
    memcpy(to, record, HEAD);
    if (record->said)
        memcpy(to + HEAD, said, record->said);
    log->end += HEAD + padded(record->said) + padded(record->answered);
}

/* ---- recording ------------------------------------------------------------------------------- */

static void close_open(struct pykvm_vcpu *vcpu, struct pykvm_log *log)
{
    struct piece said, answer;
    if (!log->open)
        return;
    uint8_t *at = log->bytes + log->open - 1;
    struct pykvm_log_record record;
    memcpy(&record, at, HEAD);
    describe(vcpu->run, &said, &answer); /* the run page is as it was, but for the answer */
    if (answer.bytes == record.answered)
        memcpy(at + HEAD + padded(record.said), answer.at, answer.bytes);
    log->open = 0;
}

/* What KVM_RUN takes from the run page besides registers.  CR8 it also leaves there. */
static uint32_t page_of(const struct kvm_run *run)
{
    return (run->request_interrupt_window != 0) | (uint32_t)(run->cr8 & 15) << 8;
}

static int64_t record_entry(struct pykvm_vcpu *vcpu, struct pykvm_log *log)
{
    struct kvm_run *run = vcpu->run;
    close_open(vcpu, log);
    if (log->waiting || log->capacity - log->end < PYKVM_LOG_ROOM)
        return PYKVM_LOGGED;
    if (!run->kvm_dirty_regs && page_of(run) == log->page)
        return PYKVM_SERVED;
    if (log->state == PYKVM_LOG_RAN) {
        log->broken = 1;
        return PYKVM_LOGGED;
    }
    if (log->state == PYKVM_LOG_COMPLETED) {
        struct pykvm_log_record record = {.kind = PYKVM_LOG_COMPLETE};
        append(log, &record, NULL);
        log->state = PYKVM_LOG_MARKED;
    }
    if (run->kvm_dirty_regs) {
        struct pykvm_log_record record = {
            .kind = PYKVM_LOG_REGISTERS,
            .said = sizeof run->s.regs,
            .address = run->kvm_dirty_regs,
        };
        append(log, &record, &run->s.regs);
    }
    if (page_of(run) != log->page) {
        struct pykvm_log_record record = {.kind = PYKVM_LOG_PAGE, .address = page_of(run)};
        append(log, &record, NULL);
        log->page = page_of(run);
    }
    return PYKVM_SERVED;
}

void pykvm_log_exit(struct pykvm_vcpu *vcpu, struct pykvm_log *log)
{
    struct piece said, answer;
    if (log->mode != PYKVM_LOG_RECORD)
        return;
    struct pykvm_log_record record = describe(vcpu->run, &said, &answer);
    record.said = said.bytes;
    record.answered = answer.bytes;
    record.number = ++log->exits;
    log->page = page_of(vcpu->run);
    log->state = PYKVM_LOG_AT_EXIT;
    uint64_t at = log->end;
    append(log, &record, said.at);
    if (answer.bytes)
        log->open = at + 1;
}

void pykvm_log_interrupted(struct pykvm_log *log, int at_once)
{
    if (!at_once)
        log->state = PYKVM_LOG_RAN;
    else if (log->state == PYKVM_LOG_AT_EXIT)
        log->state = PYKVM_LOG_COMPLETED;
}

/* ---- replaying ------------------------------------------------------------------------------- */

/* The next record: whether there is one that is whole. */
static int next_of(const struct pykvm_log *log, struct pykvm_log_record *record)
{
    uint64_t left = log->end - log->at;
    if (log->at > log->end || left < HEAD)
        return 0;
    memcpy(record, log->bytes + log->at, HEAD);
    return left - HEAD >= padded(record->said) + padded(record->answered);
}

static void pass(struct pykvm_log *log, const struct pykvm_log_record *record)
{
    log->at += HEAD + padded(record->said) + padded(record->answered);
}

static int64_t replay_entry(struct pykvm_vcpu *vcpu, struct pykvm_log *log)
{
    struct kvm_run *run = vcpu->run;
    struct pykvm_log_record record;
    while (next_of(log, &record)) {
        switch (record.kind) {
        case PYKVM_LOG_EXIT:
            return PYKVM_SERVED;
        case PYKVM_LOG_REGISTERS:
            if (record.said != sizeof run->s.regs)
                return PYKVM_LOGGED;
            memcpy(&run->s.regs, log->bytes + log->at + HEAD, sizeof run->s.regs);
            run->kvm_dirty_regs |= record.address;
            break;
        case PYKVM_LOG_PAGE:
            run->request_interrupt_window = record.address & 1;
            run->cr8 = record.address >> 8 & 15;
            break;
        case PYKVM_LOG_COMPLETE:
            if (pykvm_complete(vcpu) != -EINTR)
                return PYKVM_DIVERGED;
            break;
        default:
            return PYKVM_LOGGED;
        }
        pass(log, &record);
    }
    return PYKVM_REPLAYED;
}

int64_t pykvm_log_replay(struct pykvm_vcpu *vcpu, struct pykvm_log *log)
{
    struct piece said, answer;
    struct pykvm_log_record expected, found = describe(vcpu->run, &said, &answer);
    const uint8_t *from = log->bytes + log->at + HEAD;
    if (!next_of(log, &expected) || expected.kind != PYKVM_LOG_EXIT)
        return PYKVM_DIVERGED;
    found.said = said.bytes;
    found.answered = answer.bytes;
    found.number = expected.number;
    if (memcmp(&found, &expected, HEAD) || (said.bytes && memcmp(said.at, from, said.bytes)))
        return PYKVM_DIVERGED;
    if (answer.bytes)
        memcpy(answer.at, from + padded(said.bytes), answer.bytes);
    log->open = log->at + 1;
    pass(log, &expected);
    log->exits++;
    return PYKVM_SERVED;
}

int64_t pykvm_log_enter(struct pykvm_vcpu *vcpu, struct pykvm_log *log)
{
    return log->mode == PYKVM_LOG_REPLAY ? replay_entry(vcpu, log) : record_entry(vcpu, log);
}

void pykvm_log_found(struct pykvm_vcpu *vcpu, struct pykvm_log_record *record, uint8_t *said)
{
    struct piece said_at, answer;
    *record = describe(vcpu->run, &said_at, &answer);
    record->said = said_at.bytes;
    if (said_at.bytes)
        memcpy(said, said_at.at, said_at.bytes);
}
