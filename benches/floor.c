/*
 * floor.c - the least that a run and a reset can cost: the guest runs to its HLT, the pages that are
 * known to be dirty are copied back, and the same registers are restored by the same ioctls.
 */
#include "raw.h"

struct floor_call {
    unsigned long request;
    void *arg;
};

struct floor {
    struct raw raw;
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_vcpu_events events;
    uint8_t *image; /* of all memory */
    uint8_t *ram;
};

int floor_prepare(void)
{
    return raw_prepare();
}

struct floor *floor_new(const struct raw_guest *guest, int *error)
{
    struct floor *floor = calloc(1, sizeof *floor);
    *error = raw_open(&floor->raw, guest);
    if (*error) {
        raw_close(&floor->raw);
        free(floor);
        return NULL;
    }
    floor->regs = *guest->regs;
    floor->ram = (uint8_t *)(((uint64_t)floor->raw.memory + ALIGNMENT - 1) &
                             ~(uint64_t)(ALIGNMENT - 1));
    floor->image = malloc(guest->memory_size);
    memcpy(floor->image, floor->ram, guest->memory_size);
    return floor;
}

void floor_delete(struct floor *floor)
{
    raw_close(&floor->raw);
    free(floor->image);
    free(floor);
}

/* `count` runs; each page in `pages` (guest addresses) is copied back after each: nanoseconds. */
int64_t floor_run(struct floor *floor, uint64_t count, const uint64_t *pages, uint64_t page_count,
                  const struct floor_call *calls, uint64_t call_count)
{
    struct kvm_run *run = floor->raw.run;
    uint64_t both = KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;
    run->kvm_valid_regs = KVM_SYNC_X86_REGS | both;
    int64_t start = now();
    for (uint64_t i = 0; i < count; i++) {
        if (ioctl(floor->raw.vcpu, KVM_RUN, 0) < 0)
            return -errno;
        if (run->exit_reason != KVM_EXIT_HLT)
            return -EPROTO;
        for (uint64_t page = 0; page < page_count; page++)
            memcpy(floor->ram + pages[page], floor->image + pages[page], 4096);
        for (uint64_t call = 0; call < call_count; call++)
            if (ioctl(floor->raw.vcpu, calls[call].request, calls[call].arg) < 0)
                return -errno;
        run->s.regs.regs = floor->regs;
        run->kvm_dirty_regs = KVM_SYNC_X86_REGS;
        if (!i) { /* as KVM has them, which may differ from what it was given */
            floor->sregs = run->s.regs.sregs;
            floor->events = run->s.regs.events;
        }
        if (memcmp(&run->s.regs.sregs, &floor->sregs, sizeof floor->sregs) ||
            memcmp(&run->s.regs.events, &floor->events, sizeof floor->events)) {
            run->s.regs.sregs = floor->sregs;
            run->s.regs.events = floor->events;
            run->kvm_dirty_regs |= both;
        }
    }
    return now() - start;
}
