/*
 * reset.c - putting a machine back to what it was: memory, then the rest by a list of ioctls, then
 * the registers through the run page.
 *
 * The hidden cost of a reset is not the copying.  A page that KVM's log is told to watch anew is
 * write-protected, and the next run's first write to it is a fault of 27 to 50 us.  So, where KVM
 * leaves clearing the log to us, pages that were ever dirty stay writable and are copied back every
 * time; the log is cleared when looking at pages in vain has cost more than faulting would have.
 */
#include "pykvm.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include <x86intrin.h>

enum { PAGE = 4096 };

static const uint8_t zeros[PAGE];

uint64_t pykvm_tsc(void)
{
    return __rdtsc();
}

void pykvm_pages_mark(uint64_t *bitmap, uint64_t first, uint64_t count)
{
    for (uint64_t page = first, end = first + count; page < end;) {
        uint64_t step = 64 - page % 64 < end - page ? 64 - page % 64 : end - page;
        uint64_t bits = step == 64 ? UINT64_MAX : ((UINT64_C(1) << step) - 1) << (page % 64);
        __atomic_fetch_or(&bitmap[page / 64], bits, __ATOMIC_RELAXED);
        page += step;
    }
}

/* Whether a page was ever touched: admin-guide/mm/pagemap.rst, present or swapped. */
static int is_there(const uint64_t *pagemap, uint64_t page)
{
    return !pagemap || pagemap[page] >> 62;
}

static int holds(const uint64_t *bitmap, uint64_t page)
{
    return !bitmap || bitmap[page / 64] >> (page % 64) & 1;
}

/* ---- memory ---------------------------------------------------------------------------------- */

/* A page was written from the image, which knows of no stops: plant those that are on it. */
static void plant(const struct pykvm_reset *reset, const uint8_t *page)
{
    uint32_t low = 0, high = reset->plant_count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (reset->plants[middle] < page)
            low = middle + 1;
        else
            high = middle;
    }
    for (; low < reset->plant_count && reset->plants[low] < page + PAGE; low++)
        *reset->plants[low] = (uint8_t)reset->plant;
}

/* The pages of one word of the bitmaps; compared first, or not. */
static void put_back(const struct pykvm_reset *reset, struct pykvm_reset_slot *slot, uint64_t word,
                     uint64_t bits, int compare, uint64_t *looked, uint64_t *copied)
{
    for (; bits; bits &= bits - 1) {
        uint64_t page = word * 64 + (uint64_t)__builtin_ctzll(bits);
        if (page >= slot->pages)
            return;
        uint8_t *to = slot->memory + page * PAGE;
        int held = holds(slot->held, page);
        if (!held && slot->pagemap && !is_there(slot->pagemap, page))
            continue;
        const uint8_t *from = held ? slot->image + page * PAGE : zeros;
        ++*looked;
        if (compare && !memcmp(to, from, PAGE))
            continue;
        memcpy(to, from, PAGE);
        if (reset->plant_count)
            plant(reset, to);
        ++*copied;
    }
}

static int fetch_log(struct pykvm_reset *reset, struct pykvm_reset_slot *slot)
{
    struct kvm_dirty_log log = {.slot = slot->slot, .dirty_bitmap = slot->dirty};
    return ioctl(reset->vm_fd, KVM_GET_DIRTY_LOG, &log) < 0 ? -errno : 0;
}

static int clear_log(struct pykvm_reset *reset)
{
    for (uint32_t i = 0; i < reset->slot_count; i++) {
        struct pykvm_reset_slot *slot = &reset->slots[i];
        if (!slot->logged)
            continue;
        struct kvm_clear_dirty_log log = {
            .slot = slot->slot,
            .num_pages = (uint32_t)slot->pages,
            .dirty_bitmap = slot->dirty,
        };
        if (ioctl(reset->vm_fd, KVM_CLEAR_DIRTY_LOG, &log) < 0)
            return -errno;
    }
    reset->waste = 0;
    reset->cleared++;
    return 0;
}

int pykvm_reset_memory(struct pykvm_reset *reset)
{
    uint64_t looked = 0, copied = 0;
    int compare = reset->mode == PYKVM_RESET_WHOLE || reset->resets % PYKVM_RESET_COMPARE == 0;
    for (uint32_t i = 0; i < reset->slot_count; i++) {
        struct pykvm_reset_slot *slot = &reset->slots[i];
        int whole = slot->whole || reset->mode == PYKVM_RESET_WHOLE;
        if (slot->logged) {
            int error = fetch_log(reset, slot);
            if (error)
                return error;
        }
        for (uint64_t word = 0; word < (slot->pages + 63) / 64; word++) {
            uint64_t exposed = whole ? UINT64_MAX : slot->exposed[word];
            uint64_t bits = slot->touched[word];
            if (slot->logged)
                bits |= slot->dirty[word];
            slot->touched[word] = 0;
            if (bits)
                put_back(reset, slot, word, bits, compare, &looked, &copied);
            if (exposed & ~bits) { /* most likely as they were: not part of the reckoning */
                uint64_t ignored = 0;
                put_back(reset, slot, word, exposed & ~bits, 1, &ignored, &reset->copied);
                reset->looked += ignored;
            }
        }
        slot->whole = 0;
        slot->pagemap = NULL;
    }
    reset->looked += looked;
    reset->copied += copied;
    reset->resets++;
    if (compare)
        reset->differing = copied;
    if (reset->mode != PYKVM_RESET_MANUAL)
        return 0;
    if (looked > reset->differing)
        reset->waste += looked - reset->differing;
    return reset->waste > reset->patience * (reset->differing + 1) ? clear_log(reset) : 0;
}

/* ---- the rest -------------------------------------------------------------------------------- */

/* Have KVM finish the access of the last exit, with all ones for a read: 0, or -EAGAIN. */
static int complete(struct pykvm_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    if (!vcpu->entries)
        return 0;
    if (run->exit_reason == KVM_EXIT_HLT || run->exit_reason == KVM_EXIT_SHUTDOWN)
        return 0; /* nothing is open */
    run->kvm_dirty_regs = 0;
    return pykvm_complete(vcpu) == -EINTR ? 0 : -EAGAIN;
}

static int call(struct pykvm_reset_call *each, int64_t *result)
{
    if (each->is_tsc) { /* the guest's clock shows what it showed then */
        struct kvm_device_attr *attr = each->arg;
        *(uint64_t *)(uintptr_t)attr->addr = each->offset + each->then - __rdtsc();
    }
    *result = ioctl(each->fd, each->request, each->arg);
    if (*result < 0)
        return -errno;
    return *result == each->expected ? 0 : -EIO;
}

/*
 * Out of the guest's own guest, if it may be in one: before its registers, for leaving changes them,
 * and KVM takes RFLAGS of the run page before the SREGS that would make it leave.
 */
static int leave_nested(struct pykvm_reset_vcpu *each)
{
    const uint64_t svme = 1 << 12, vmxe = 1 << 13; /* EFER, CR4 */
    struct kvm_run *run = each->vcpu->run;
    struct kvm_sregs sregs;
    if (!each->nested)
        return 0;
    if (each->vcpu->sync_regs && run->kvm_valid_regs & ~run->kvm_dirty_regs & KVM_SYNC_X86_SREGS)
        sregs = run->s.regs.sregs;
    else if (ioctl(each->vcpu->fd, KVM_GET_SREGS, &sregs) < 0)
        return -errno;
    if (!(sregs.efer & svme) && !(sregs.cr4 & vmxe))
        return 0;
    return ioctl(each->vcpu->fd, KVM_SET_NESTED_STATE, each->nested) < 0 ? -errno : 0;
}

static void put_registers(struct pykvm_reset_vcpu *each)
{
    struct kvm_run *run = each->vcpu->run;
    struct kvm_sync_regs *now = &run->s.regs, *saved = each->saved;
    uint64_t dirty = each->sync;
    uint64_t seen = each->seen & run->kvm_valid_regs & ~run->kvm_dirty_regs;
    if (seen & KVM_SYNC_X86_SREGS && !memcmp(&now->sregs, &saved->sregs, sizeof now->sregs))
        dirty &= ~(uint64_t)KVM_SYNC_X86_SREGS;
    if (seen & KVM_SYNC_X86_EVENTS && !memcmp(&now->events, &saved->events, sizeof now->events))
        dirty &= ~(uint64_t)KVM_SYNC_X86_EVENTS;
    now->regs = saved->regs;
    now->sregs = saved->sregs;
    now->events = saved->events;
    run->cr8 = saved->sregs.cr8; /* without a local APIC, KVM takes it from here on entry */
    run->kvm_dirty_regs = dirty;
    each->vcpu->access.pending = PYKVM_IDLE;
}

int pykvm_reset(struct pykvm_reset *reset)
{
    for (uint32_t i = 0; i < reset->vcpu_count; i++)
        if (complete(reset->vcpus[i].vcpu))
            return -EAGAIN;
    int error = pykvm_reset_memory(reset);
    reset->result = -1;
    if (error) {
        reset->failed = PYKVM_RESET_FAILED_LOG;
        return error;
    }
    for (uint32_t i = 0; i < reset->vcpu_count; i++) {
        error = leave_nested(&reset->vcpus[i]);
        if (error) {
            reset->failed = PYKVM_RESET_FAILED_NESTED;
            return error;
        }
    }
    for (uint32_t i = 0; i < reset->call_count; i++) {
        error = call(&reset->calls[i], &reset->result);
        if (error) {
            reset->failed = i;
            return error;
        }
    }
    for (uint32_t i = 0; i < reset->vcpu_count; i++)
        put_registers(&reset->vcpus[i]);
    return 0;
}

/* ---- images ---------------------------------------------------------------------------------- */

static int write_all(int fd, const uint8_t *from, uint64_t length, int64_t offset)
{
    while (length) {
        ssize_t written = pwrite(fd, from, length, offset);
        if (written < 0 && errno == EINTR)
            continue;
        if (written <= 0)
            return written < 0 ? -errno : -EIO;
        from += written, offset += written, length -= (uint64_t)written;
    }
    return 0;
}

int64_t pykvm_image_write(int fd, int64_t offset, const uint8_t *memory, uint64_t pages,
                          const uint64_t *pagemap, const uint64_t *below, uint64_t *held)
{
    int64_t written = 0;
    uint64_t page = 0;
    while (page < pages) {
        uint64_t first = page;
        while (page < pages && page - first < 256 && (is_there(pagemap, page) || (below && holds(below, page))) &&
               memcmp(memory + page * PAGE, zeros, PAGE)) {
            held[page / 64] |= UINT64_C(1) << (page % 64);
            page++;
        }
        if (page == first) {
            page++;
            continue;
        }
        int error = write_all(fd, memory + first * PAGE, (page - first) * PAGE,
                              offset + (int64_t)(first * PAGE));
        if (error)
            return error;
        written += (int64_t)(page - first);
    }
    return written;
}

uint64_t pykvm_image_diff(const uint8_t *a, const uint64_t *held_a, const uint8_t *b,
                          const uint64_t *held_b, uint64_t pages, uint64_t *differs)
{
    uint64_t count = 0;
    for (uint64_t page = 0; page < pages; page++) {
        int has_a = holds(held_a, page), has_b = holds(held_b, page);
        if (!has_a && !has_b)
            continue;
        const uint8_t *of_a = has_a ? a + page * PAGE : zeros;
        const uint8_t *of_b = has_b ? b + page * PAGE : zeros;
        if (!memcmp(of_a, of_b, PAGE))
            continue;
        differs[page / 64] |= UINT64_C(1) << (page % 64);
        count++;
    }
    return count;
}
