/*
 * vring.c - the device's side of a split virtqueue (virtio 1.2, 2.7).
 *
 * The driver is not to be trusted, and its other processors may change the ring at any moment.  So
 * whatever lies in guest memory is read once, by one load, and what was read is checked before it
 * is used; work is bounded by the sizes of tables; and addresses go through the map of RAM.  x86 is
 * little endian, as virtio is.
 */
#include "pykvm.h"

#include <errno.h>
#include <stddef.h>

#define DESCRIPTOR 16 /* bytes; 2.7.5 */
#define USED_ELEMENT 8
#define TOTAL_BYTES (UINT64_C(1) << 32) /* of a chain; 2.7.5.2 */
#define INDIRECT_MAX 1024 /* descriptors of an indirect table: "a reasonable limit", 2.7.4.1 */

enum { NEXT = 1, WRITE = 2, INDIRECT = 4 }; /* flags of a descriptor, 2.7.5 */

struct descriptor {
    uint64_t gpa;
    uint32_t length;
    uint16_t flags;
    uint16_t next;
};

/* ---- guest memory ---------------------------------------------------------------------------- */

static const struct pykvm_ram_map *map_of(const struct pykvm_vring *ring)
{
    return __atomic_load_n(&ring->ram->map, __ATOMIC_ACQUIRE);
}

static struct pykvm_ram_region *find(const struct pykvm_ram_map *map, uint64_t gpa)
{
    uint32_t low = 0, high = map->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        struct pykvm_ram_region *region = &map->regions[middle];
        if (gpa < region->first)
            high = middle;
        else if (gpa > region->last)
            low = middle + 1;
        else
            return region;
    }
    return NULL;
}

/* The element of a part, at an offset within it.  enable() has seen that all of it is RAM. */
static void *element(const struct pykvm_vring *ring, enum pykvm_vring_part part, uint32_t offset)
{
    const struct pykvm_vring_part_at *at = &ring->part[part];
    if (at->host)
        return at->host + offset;
    struct pykvm_ram_region *region = find(map_of(ring), at->gpa + offset);
    return region->host + (at->gpa + offset - region->first);
}

static uint16_t load16(const void *from)
{
    return __atomic_load_n((const uint16_t *)from, __ATOMIC_RELAXED);
}

static void store16(void *to, uint16_t value)
{
    __atomic_store_n((uint16_t *)to, value, __ATOMIC_RELAXED);
}

/* An indirect table may lie anywhere, also at odd addresses: 2.7.5.3. */
struct anywhere {
    uint64_t word;
} __attribute__((packed, may_alias));

static struct descriptor load_descriptor(const void *from)
{
    const volatile struct anywhere *words = from; /* volatile: one load each */
    uint64_t gpa = words[0].word;
    uint64_t rest = words[1].word;
    return (struct descriptor){
        .gpa = gpa,
        .length = (uint32_t)rest,
        .flags = (uint16_t)(rest >> 32),
        .next = (uint16_t)(rest >> 48),
    };
}

/* ---- fields of the ring: available 2.7.6, used 2.7.8 ------------------------------------------ */

static uint16_t *avail_index(const struct pykvm_vring *ring)
{
    return element(ring, PYKVM_DRIVER, 2);
}

static uint16_t *used_event(const struct pykvm_vring *ring)
{
    return element(ring, PYKVM_DRIVER, 4 + 2 * (uint32_t)ring->size);
}

static uint16_t *used_index(const struct pykvm_vring *ring)
{
    return element(ring, PYKVM_DEVICE, 2);
}

static uint16_t *avail_event(const struct pykvm_vring *ring)
{
    return element(ring, PYKVM_DEVICE, 4 + USED_ELEMENT * (uint32_t)ring->size);
}

/* ---- whether the ring can be used at all ------------------------------------------------------ */

/* Whether all of a range is RAM, and writable if asked; a host address if it is in one region. */
static int covers(const struct pykvm_ram_map *map, uint64_t gpa, uint64_t bytes, int writable,
                  uint8_t **host)
{
    if (gpa + bytes < gpa)
        return 0;
    *host = NULL;
    for (uint64_t left = bytes; left;) {
        struct pykvm_ram_region *region = find(map, gpa);
        if (!region || (writable && region->readonly))
            return 0;
        uint64_t room = region->last - gpa + 1;
        if (left == bytes && room >= bytes)
            *host = region->host + (gpa - region->first);
        if (room >= left)
            break;
        gpa += room;
        left -= room;
    }
    return 1;
}

int pykvm_vring_enable(struct pykvm_vring *ring)
{
    uint64_t size = ring->size;
    uint64_t bytes[3] = {DESCRIPTOR * size, 6 + 2 * size, 6 + USED_ELEMENT * size}; /* 2.7 */
    static const uint64_t align[3] = {16, 2, 4};
    int error = 0;

    pykvm_spin_lock(&ring->lock);
    if (!size || size & (size - 1) || size > 32768)
        error = PYKVM_BREACH_SIZE;
    for (int i = 0; i < 3 && !error; i++) {
        struct pykvm_vring_part_at *part = &ring->part[i];
        if (part->gpa & (align[i] - 1))
            error = PYKVM_BREACH_ALIGN;
        else if (!covers(map_of(ring), part->gpa, bytes[i], i == PYKVM_DEVICE, &part->host))
            error = PYKVM_BREACH_RING;
    }
    if (!error) {
        ring->next_avail = ring->avail_seen = ring->used = ring->signalled = 0;
        ring->signalled_valid = 1;
        ring->quiet = 0;
        ring->in_flight = 0;
        ring->enabled = 1;
    }
    pykvm_spin_unlock(&ring->lock);
    return error;
}

void pykvm_vring_disable(struct pykvm_vring *ring)
{
    pykvm_spin_lock(&ring->lock);
    ring->enabled = 0;
    ring->generation++;
    ring->in_flight = 0;
    pykvm_spin_unlock(&ring->lock);
}

/* ---- a chain ---------------------------------------------------------------------------------- */

/* Add a buffer, in as many segments as it touches regions: 0 or a breach. */
static int add(const struct pykvm_ram_map *map, struct pykvm_chain *chain,
               const struct descriptor *descriptor)
{
    uint16_t writable = (descriptor->flags & WRITE) != 0;
    uint64_t gpa = descriptor->gpa;
    uint64_t *total = writable ? &chain->write_bytes : &chain->read_bytes;

    *total += descriptor->length;
    if (chain->read_bytes + chain->write_bytes > TOTAL_BYTES)
        return PYKVM_BREACH_TOTAL;
    for (uint64_t left = descriptor->length; left;) {
        struct pykvm_ram_region *region = find(map, gpa);
        if (!region || (writable && region->readonly))
            return PYKVM_BREACH_BUFFER;
        if (chain->count == chain->capacity)
            return PYKVM_BREACH_LONG;
        uint64_t room = region->last - gpa + 1, piece = room < left ? room : left;
        if (writable && region->touched) {
            uint64_t first = (gpa - region->first) / 4096;
            pykvm_pages_mark(region->touched, first, (gpa + piece - 1 - region->first) / 4096 - first + 1);
        }
        chain->segments[chain->count++] = (struct pykvm_segment){
            .offset = gpa - region->first,
            .length = (uint32_t)piece,
            .region = (uint16_t)region->id,
            .writable = writable,
        };
        gpa += piece; /* cannot wrap: RAM ends below 2**52 */
        left -= piece;
    }
    if (!writable)
        chain->readable = chain->count;
    return 0;
}

/* A descriptor of a table that spans regions, and may itself. */
static void copy_in(const struct pykvm_ram_map *map, uint64_t gpa, uint8_t *to)
{
    for (int i = 0; i < DESCRIPTOR; i++) {
        const struct pykvm_ram_region *region = find(map, gpa + i);
        to[i] = __atomic_load_n(&region->host[gpa + i - region->first], __ATOMIC_RELAXED);
    }
}

/* The descriptors of an indirect table, 2.7.5.3: 0 or a breach. */
static int walk_indirect(const struct pykvm_ram_map *map, struct pykvm_chain *chain,
                         const struct descriptor *table, int *wrote)
{
    uint8_t *host;
    uint32_t count = table->length / DESCRIPTOR;
    if (!count || table->length % DESCRIPTOR || count > INDIRECT_MAX)
        return PYKVM_BREACH_TABLE;
    if (!covers(map, table->gpa, table->length, 0, &host))
        return PYKVM_BREACH_TABLE;
    for (uint32_t index = 0, seen = 0;;) {
        uint8_t copy[DESCRIPTOR];
        const uint8_t *at = copy;
        if (host)
            at = host + (size_t)index * DESCRIPTOR;
        else
            copy_in(map, table->gpa + (uint64_t)index * DESCRIPTOR, copy);
        struct descriptor descriptor = load_descriptor(at);
        if (descriptor.flags & INDIRECT)
            return PYKVM_BREACH_INDIRECT;
        if (*wrote && !(descriptor.flags & WRITE))
            return PYKVM_BREACH_ORDER;
        *wrote |= descriptor.flags & WRITE;
        int error = add(map, chain, &descriptor);
        if (error)
            return error;
        if (!(descriptor.flags & NEXT))
            return 0;
        if (++seen == count)
            return PYKVM_BREACH_LOOP;
        index = descriptor.next;
        if (index >= count)
            return PYKVM_BREACH_NEXT;
    }
}

static int walk(struct pykvm_vring *ring, struct pykvm_chain *chain)
{
    const struct pykvm_ram_map *map = map_of(ring);
    uint32_t index = chain->head;
    int wrote = 0;

    for (uint32_t seen = 0;;) {
        struct descriptor descriptor =
            load_descriptor(element(ring, PYKVM_DESC, index * DESCRIPTOR));
        if (descriptor.flags & INDIRECT) {
            if (!ring->indirect || descriptor.flags & NEXT)
                return PYKVM_BREACH_INDIRECT;
            return walk_indirect(map, chain, &descriptor, &wrote);
        }
        if (wrote && !(descriptor.flags & WRITE))
            return PYKVM_BREACH_ORDER;
        wrote |= descriptor.flags & WRITE;
        int error = add(map, chain, &descriptor);
        if (error)
            return error;
        if (!(descriptor.flags & NEXT))
            return 0;
        if (++seen == ring->size)
            return PYKVM_BREACH_LOOP;
        index = descriptor.next;
        if (index >= ring->size)
            return PYKVM_BREACH_NEXT;
    }
}

/* ---- the available ring ------------------------------------------------------------------------ */

/* Ask the driver for notifications, or for none: 2.7.10.  Only a wish, so it may come late. */
static void want_notifications(struct pykvm_vring *ring, int wanted)
{
    if (ring->event_idx) { /* what is left behind by it is quiet by itself */
        if (wanted)
            store16(avail_event(ring), ring->next_avail);
    } else if (ring->quiet == wanted) {
        store16(element(ring, PYKVM_DEVICE, 0), wanted ? 0 : 1 /* VIRTQ_USED_F_NO_NOTIFY */);
        ring->quiet = !wanted;
    }
}

/* How many chains wait, after a look at the driver's index if it need be. */
static uint16_t waiting(struct pykvm_vring *ring)
{
    if (ring->avail_seen == ring->next_avail)
        ring->avail_seen = __atomic_load_n(avail_index(ring), __ATOMIC_ACQUIRE);
    return (uint16_t)(ring->avail_seen - ring->next_avail);
}

/* The same, and if it is none, the driver will notify of the next. */
static uint16_t waiting_or_notified(struct pykvm_vring *ring)
{
    uint16_t count = waiting(ring);
    if (!count) {
        want_notifications(ring, 1);
        __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the driver stores its index, then looks */
        count = waiting(ring);
    }
    return count;
}

static int pop(struct pykvm_vring *ring, struct pykvm_chain *chain)
{
    uint16_t count = ring->enabled ? waiting_or_notified(ring) : 0;
    if (!count)
        return 0;
    want_notifications(ring, 0);
    if (count > ring->size)
        return PYKVM_BREACH_INDEX;
    if (ring->in_flight >= ring->size)
        return PYKVM_BREACH_FLIGHT;

    uint32_t entry = ring->next_avail & (ring->size - 1);
    chain->head = load16(element(ring, PYKVM_DRIVER, 4 + 2 * entry));
    chain->count = chain->readable = 0;
    chain->read_bytes = chain->write_bytes = 0;
    chain->generation = ring->generation;
    if (chain->head >= ring->size)
        return PYKVM_BREACH_HEAD;
    int error = walk(ring, chain);
    if (error)
        return error;
    ring->next_avail++;
    ring->in_flight++;
    return 1;
}

int pykvm_vring_pop(struct pykvm_vring *ring, struct pykvm_chain *chain)
{
    pykvm_spin_lock(&ring->lock);
    int result = pop(ring, chain);
    pykvm_spin_unlock(&ring->lock);
    return result;
}

int pykvm_vring_waiting(struct pykvm_vring *ring)
{
    pykvm_spin_lock(&ring->lock);
    int result = ring->enabled && waiting_or_notified(ring) != 0;
    pykvm_spin_unlock(&ring->lock);
    return result;
}

/* ---- the used ring ----------------------------------------------------------------------------- */

int pykvm_vring_push(struct pykvm_vring *ring, uint32_t generation, uint32_t head, uint32_t written)
{
    pykvm_spin_lock(&ring->lock);
    if (!ring->enabled || generation != ring->generation || !ring->in_flight) {
        pykvm_spin_unlock(&ring->lock);
        return -ESTALE;
    }
    uint32_t entry = ring->used & (ring->size - 1);
    uint32_t *used = element(ring, PYKVM_DEVICE, 4 + USED_ELEMENT * entry);
    __atomic_store_n(&used[0], head, __ATOMIC_RELAXED);
    uint32_t *length = element(ring, PYKVM_DEVICE, 4 + USED_ELEMENT * entry + 4);
    __atomic_store_n(length, written, __ATOMIC_RELAXED);
    ring->used++;
    ring->in_flight--;
    if (ring->used == ring->signalled) /* once around */
        ring->signalled_valid = 0;
    __atomic_store_n(used_index(ring), ring->used, __ATOMIC_RELEASE);
    pykvm_spin_unlock(&ring->lock);
    return 0;
}

int pykvm_vring_should_interrupt(struct pykvm_vring *ring)
{
    int wanted = 0;
    pykvm_spin_lock(&ring->lock);
    uint16_t now = ring->used, before = ring->signalled;
    if (ring->enabled && (now != before || !ring->signalled_valid)) {
        __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the driver stores its wish, then looks */
        if (!ring->event_idx)
            wanted = !(load16(element(ring, PYKVM_DRIVER, 0)) & 1 /* VIRTQ_AVAIL_F_NO_INTERRUPT */);
        else
            wanted = !ring->signalled_valid ||
                     (uint16_t)(now - load16(used_event(ring)) - 1) < (uint16_t)(now - before);
        ring->signalled = now;
        ring->signalled_valid = 1;
    }
    pykvm_spin_unlock(&ring->lock);
    return wanted;
}
