/* watch.c - exits written down as they happen, and stops that are planted in the guest's code. */
#include "pykvm.h"

#include <string.h>

/* ---- events ---------------------------------------------------------------------------------- */

static int matches(const struct pykvm_event_filter *filter, const struct pykvm_event *event)
{
    if (filter->reason != UINT32_MAX && filter->reason != event->reason)
        return 0;
    if (filter->direction && (filter->direction == 1) != (event->flags & PYKVM_EVENT_WRITE))
        return 0;
    return filter->first <= event->address && event->address <= filter->last;
}

static int wanted(const struct pykvm_events *events, const struct pykvm_event *event)
{
    for (uint32_t i = 0; i < events->filter_count; i++)
        if (matches(&events->filters[i], event))
            return 1;
    return !events->filter_count;
}

/* Where the data of the exit lies in the run page, or NULL, and how many bytes of it count. */
static const uint8_t *data_of(const struct kvm_run *run, uint32_t *bytes)
{
    switch (run->exit_reason) {
    case KVM_EXIT_IO:
        *bytes = run->io.size * run->io.count;
        return (const uint8_t *)run + run->io.data_offset;
    case KVM_EXIT_MMIO:
        *bytes = run->mmio.len;
        return run->mmio.data;
    case KVM_EXIT_X86_RDMSR:
    case KVM_EXIT_X86_WRMSR:
        *bytes = sizeof run->msr.data;
        return (const uint8_t *)&run->msr.data;
    default:
        *bytes = 0;
        return NULL;
    }
}

static uint64_t data_now(const struct kvm_run *run)
{
    uint64_t data = 0;
    uint32_t bytes;
    const uint8_t *from = data_of(run, &bytes);
    if (from)
        memcpy(&data, from, bytes < sizeof data ? bytes : sizeof data);
    return data;
}

static struct pykvm_event event_of(const struct kvm_run *run)
{
    struct pykvm_event event = {
        .reason = (uint16_t)(run->exit_reason < UINT16_MAX ? run->exit_reason : UINT16_MAX),
        .count = 1,
    };
    switch (run->exit_reason) {
    case KVM_EXIT_IO:
        event.address = run->io.port;
        event.size = run->io.size;
        event.count = (uint16_t)run->io.count;
        event.flags = run->io.direction == KVM_EXIT_IO_OUT ? PYKVM_EVENT_WRITE : 0;
        break;
    case KVM_EXIT_MMIO:
        event.address = run->mmio.phys_addr;
        event.size = (uint8_t)run->mmio.len;
        event.flags = run->mmio.is_write ? PYKVM_EVENT_WRITE : 0;
        break;
    case KVM_EXIT_X86_RDMSR:
    case KVM_EXIT_X86_WRMSR:
        event.address = run->msr.index;
        event.size = sizeof run->msr.data;
        event.flags = run->exit_reason == KVM_EXIT_X86_WRMSR ? PYKVM_EVENT_WRITE : 0;
        break;
    case KVM_EXIT_HYPERCALL:
        event.address = run->hypercall.nr;
        break;
    case KVM_EXIT_DEBUG:
        event.address = run->debug.arch.pc;
        break;
    }
    return event;
}

int64_t pykvm_events_now(const struct pykvm_events *events)
{
    return events->ticks ? (int64_t)__builtin_ia32_rdtsc() : pykvm_now();
}

/* Processors whose TSCs are a little apart: no time has gone by. */
static uint64_t between(int64_t from, int64_t to)
{
    return to > from ? (uint64_t)(to - from) : 0;
}

static void close_at(struct pykvm_vcpu *vcpu, struct pykvm_events *events, int64_t now)
{
    if (!events->open)
        return;
    events->open = 0;
    struct pykvm_event *event = &events->events[(events->head - 1) & (events->capacity - 1)];
    event->spent = between(event->time, now);
    if (!(event->flags & PYKVM_EVENT_WRITE) && event->size)
        event->data = data_now(vcpu->run);
    event->flags |= PYKVM_EVENT_DONE;
}

void pykvm_events_close(struct pykvm_vcpu *vcpu, struct pykvm_events *events)
{
    close_at(vcpu, events, pykvm_events_now(events));
}

void pykvm_events_enter(struct pykvm_vcpu *vcpu, struct pykvm_events *events)
{
    if (events->rip)
        vcpu->run->kvm_valid_regs |= KVM_SYNC_X86_REGS;
    events->entered = pykvm_events_now(events);
    close_at(vcpu, events, events->entered);
}

void pykvm_events_exit(struct pykvm_vcpu *vcpu, struct pykvm_events *events)
{
    const struct kvm_run *run = vcpu->run;
    struct pykvm_event event = event_of(run);
    if (!wanted(events, &event)) {
        events->passed++;
        return;
    }
    event.time = pykvm_events_now(events);
    if (events->entered) /* else the trace was begun while KVM_RUN ran */
        event.inside = between(events->entered, event.time);
    event.exit = (uint32_t)vcpu->exits;
    if (event.flags & PYKVM_EVENT_WRITE)
        event.data = data_now(run);
    if (run->kvm_valid_regs & KVM_SYNC_X86_REGS) {
        event.rip = run->s.regs.regs.rip;
        event.flags |= PYKVM_EVENT_RIP;
    }
    events->events[events->head & (events->capacity - 1)] = event;
    events->open = 1;
    __atomic_store_n(&events->head, events->head + 1, __ATOMIC_RELEASE);
}

/* ---- planted stops --------------------------------------------------------------------------- */

int pykvm_may_be_planted(const struct kvm_run *run, const struct pykvm_planted *planted)
{
    if (run->io.direction != KVM_EXIT_IO_IN || run->io.size != 1 || run->io.count != 1)
        return 0;
    uint64_t offset = (run->s.regs.regs.rip + run->s.regs.sregs.cs.base) & 0xfff;
    return planted->offsets[offset / 64] >> offset % 64 & 1;
}
