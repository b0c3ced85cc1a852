/* ring.c - items between vCPU threads and Python; nothing is dropped, nothing stranded. */
#include "pykvm.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

/* Copy between the ring, from item number `at` on, and a flat buffer: two pieces at most. */
static void copy(struct pykvm_ring *ring, uint64_t at, uint8_t *flat, uint32_t count, int in)
{
    while (count) {
        uint32_t start = (uint32_t)(at & (ring->capacity - 1));
        uint32_t piece = ring->capacity - start < count ? ring->capacity - start : count;
        uint8_t *items = ring->items + (size_t)start * ring->item_size;
        size_t bytes = (size_t)piece * ring->item_size;
        if (in)
            memcpy(items, flat, bytes);
        else
            memcpy(flat, items, bytes);
        flat += bytes;
        at += piece;
        count -= piece;
    }
}

int pykvm_ring_push(struct pykvm_ring *ring, const void *items, uint32_t count)
{
    pykvm_spin_lock(&ring->lock);
    uint64_t used = ring->head - ring->tail;
    if (count > ring->capacity - used) {
        pykvm_spin_unlock(&ring->lock);
        return -ENOSPC;
    }
    copy(ring, ring->head, (uint8_t *)items, count, 1);
    ring->head += count;
    pykvm_spin_unlock(&ring->lock);
    if (!used && ring->eventfd >= 0) {
        uint64_t one = 1;
        ssize_t ignored = write(ring->eventfd, &one, sizeof one); /* EAGAIN: already readable */
        (void)ignored;
    }
    return 0;
}

uint32_t pykvm_ring_pop(struct pykvm_ring *ring, void *items, uint32_t max)
{
    pykvm_spin_lock(&ring->lock);
    uint64_t used = ring->head - ring->tail;
    uint32_t count = used < max ? (uint32_t)used : max;
    copy(ring, ring->tail, items, count, 0);
    ring->tail += count;
    pykvm_spin_unlock(&ring->lock);
    return count;
}
