/* bus.c - sorted PIO and MMIO ranges: a C action, or a slot handed to Python. */
#include "pykvm.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

static struct pykvm_range *find(const struct pykvm_table *table, uint64_t address, uint32_t *hint)
{
    if (!table)
        return NULL;
    if (*hint < table->count) { /* guests hit the same register again and again */
        struct pykvm_range *range = table->ranges[*hint];
        if (range->first <= address && address <= range->last)
            return range;
    }
    uint32_t low = 0, high = table->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        struct pykvm_range *range = table->ranges[middle];
        if (address < range->first) {
            high = middle;
        } else if (address > range->last) {
            low = middle + 1;
        } else {
            *hint = middle;
            return range;
        }
    }
    return NULL;
}

static int record(struct pykvm_vcpu *vcpu, struct pykvm_range *range, uint64_t value)
{
    const struct pykvm_access *access = &vcpu->access;
    struct pykvm_record item = {
        .address = access->address,
        .value = value,
        .exit = vcpu->exits,
        .vcpu = vcpu->index,
        .size = access->size,
        .is_write = access->is_write,
    };
    return pykvm_ring_push(range->out, &item, 1);
}

/* Little endian; where fewer bytes wait than the read wants, the upper ones are zero. */
static int fifo_read(struct pykvm_range *range, uint8_t size, uint64_t *value)
{
    *value = 0;
    if (pykvm_ring_pop(range->in, value, size) > 0)
        return 0;
    *value = range->value;
    return range->in->more ? -EAGAIN : 0;
}

static uint64_t mask(uint8_t size)
{
    return size >= 8 ? UINT64_MAX : (UINT64_C(1) << (8 * size)) - 1;
}

static void put(struct pykvm_access *access, uint64_t value)
{
    memcpy(access->data, &value, access->size); /* x86 is little endian, and so is this host */
}

uint64_t pykvm_clock_read(const struct pykvm_clock *clock)
{
    unsigned __int128 ns = (unsigned __int128)(pykvm_now() - clock->start);
    return clock->base + (uint64_t)(ns * clock->hz / 1000000000);
}

void pykvm_latch_set(struct pykvm_latch *latch, uint32_t bits)
{
    __atomic_fetch_or(&latch->bits, bits, __ATOMIC_SEQ_CST);
}

static void latch_access(struct pykvm_latch *latch, struct pykvm_access *access)
{
    uint32_t bits = 0;
    if (access->is_write) {
        if (access->offset == sizeof bits && access->size == sizeof bits)
            __atomic_fetch_and(&latch->bits, ~(uint32_t)access->value, __ATOMIC_SEQ_CST);
        return;
    }
    if (access->offset == 0 && access->size == sizeof bits)
        bits = __atomic_load_n(&latch->bits, __ATOMIC_SEQ_CST);
    put(access, bits);
}

static void pci_address(struct pykvm_pci *pci, struct pykvm_access *access)
{
    if (access->offset != 0 || access->size != sizeof pci->address) { /* no access to it */
        if (!access->is_write)
            put(access, PYKVM_ALL_ONES);
    } else if (access->is_write) {
        __atomic_store_n(&pci->address, (uint32_t)access->value, __ATOMIC_SEQ_CST);
    } else {
        put(access, __atomic_load_n(&pci->address, __ATOMIC_SEQ_CST));
    }
}

/* A read of configuration space; whether C has served it. */
static int pci_read(struct pykvm_pci *pci, struct pykvm_access *access)
{
    uint32_t address = __atomic_load_n(&pci->address, __ATOMIC_SEQ_CST);
    uint32_t device = address >> 11 & 31;
    uint32_t first = (address & 0xfc) + (uint32_t)access->offset; /* below 256 */
    uint32_t count = 4 - (uint32_t)access->offset; /* of the four bytes that are addressed */
    const uint8_t *config = NULL;

    put(access, PYKVM_ALL_ONES);
    if (count > access->size)
        count = access->size;
    if (address >> 31 && !(address & 0x00ff0700)) /* enabled; bus 0, function 0 */
        config = pci->config[device];
    if (!config)
        return 1;
    uint32_t live = pci->live[device];
    if (live && first < live + 4 && live < first + count)
        return 0;
    memcpy(access->data, config + first, count);
    return 1;
}

static int64_t ask_python(struct pykvm_access *access, int64_t result)
{
    access->pending = PYKVM_UNANSWERED;
    return result;
}

/* One item: PYKVM_SERVED, or what to return to Python. */
static int64_t serve_item(struct pykvm_vcpu *vcpu, struct pykvm_range *range)
{
    struct pykvm_access *access = &vcpu->access;
    uint64_t one = 1;

    switch (access->is_write ? range->on_write : range->on_read) {
    case PYKVM_IGNORE:
        if (!access->is_write)
            put(access, PYKVM_ALL_ONES);
        return PYKVM_SERVED;
    case PYKVM_CONSTANT:
        break;
    case PYKVM_LOG:
        if (record(vcpu, range, access->is_write ? access->value : range->value & mask(access->size)))
            goto full;
        break;
    case PYKVM_FIFO:
        if (access->is_write) {
            if (pykvm_ring_push(range->out, &access->value, access->size))
                goto full;
        } else {
            uint64_t value;
            if (fifo_read(range, access->size, &value))
                goto full;
            put(access, value);
        }
        return PYKVM_SERVED;
    case PYKVM_EVENTFD:
        /* A counter at its ceiling has long woken its reader; there is nothing to lose. */
        if (write(range->fd, &one, sizeof one) < 0 && errno != EAGAIN)
            return ask_python(access, PYKVM_ACCESS);
        break;
    case PYKVM_UART:
        if (pykvm_uart_access(range->device, access->offset, access->data, access->size,
                              access->is_write))
            goto full;
        return PYKVM_SERVED;
    case PYKVM_CLOCK:
        if (!access->is_write)
            put(access, pykvm_clock_read(range->device) >> (8 * access->offset & 63));
        return PYKVM_SERVED;
    case PYKVM_LATCH:
        latch_access(range->device, access);
        return PYKVM_SERVED;
    case PYKVM_PCI_ADDRESS:
        pci_address(range->device, access);
        return PYKVM_SERVED;
    case PYKVM_PCI_DATA:
        return pci_read(range->device, access) ? PYKVM_SERVED : ask_python(access, PYKVM_ACCESS);
    case PYKVM_BLK:
        if (access->is_write && access->value <= UINT32_MAX &&
            pykvm_blk_serve(range->device, (uint32_t)access->value, 0))
            return ask_python(access, PYKVM_ACCESS);
        break;
    case PYKVM_STOP:
        return ask_python(access, PYKVM_STOPPED);
    default:
        return ask_python(access, PYKVM_ACCESS);
    }
    if (!access->is_write)
        put(access, range->value);
    return PYKVM_SERVED;

full:
    access->pending = PYKVM_RETRY;
    return PYKVM_FULL;
}

int64_t pykvm_bus_serve(struct pykvm_vcpu *vcpu)
{
    struct pykvm_access *access = &vcpu->access;
    struct pykvm_table *const *space = access->is_mmio ? &vcpu->mmio : &vcpu->pio;
    struct pykvm_table *table = __atomic_load_n(space, __ATOMIC_ACQUIRE);
    struct pykvm_range *range = find(table, access->address, &vcpu->hint[access->is_mmio]);
    if (!range && table)
        range = table->rest;

    for (; access->index < access->count; access->index++, access->data += access->size) {
        int first_try = access->pending != PYKVM_RETRY;
        access->pending = PYKVM_IDLE;
        access->value = 0;
        if (access->is_write)
            memcpy(&access->value, access->data, access->size);
        if (!range)
            return ask_python(access, PYKVM_UNCLAIMED);
        access->slot = range->slot;
        access->offset = access->address - range->first;
        if (first_try)
            __atomic_fetch_add(&range->hits, 1, __ATOMIC_RELAXED);
        int64_t result = serve_item(vcpu, range);
        if (result != PYKVM_SERVED)
            return result;
    }
    return PYKVM_SERVED;
}

void pykvm_bus_answer(struct pykvm_vcpu *vcpu, uint64_t answer)
{
    struct pykvm_access *access = &vcpu->access;
    if (!access->is_write)
        put(access, answer);
    access->pending = PYKVM_IDLE;
    access->index++;
    access->data += access->size;
}
