/* vring_loop.c - a driver and a device around one split virtqueue, and the least that each needs. */
#define _GNU_SOURCE
#include <stdint.h>
#include <string.h>
#include <time.h>

struct descriptor {
    uint64_t gpa;
    uint32_t length;
    uint16_t flags;
    uint16_t next;
};

/* The parts of a ring of `size` entries, as addresses of the host. */
struct parts {
    struct descriptor *desc;
    uint16_t *avail;
    uint16_t *used;
    uint64_t size;
};

typedef int (*pop_function)(void *ring, void *chain);
typedef int (*push_function)(void *ring, uint32_t generation, uint32_t head, uint32_t written);

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static void offer(struct parts *parts, uint16_t index)
{
    parts->avail[2 + (index & (parts->size - 1))] = 0;
    __atomic_store_n(&parts->avail[1], (uint16_t)(index + 1), __ATOMIC_RELEASE);
}

/* Nanoseconds for `rounds` of offer, pop, push; or what pop or push said. */
int64_t vring_ours(struct parts *parts, pop_function pop, push_function push, void *ring,
                   void *chain, const uint32_t *generation, const uint32_t *head, uint64_t rounds)
{
    uint16_t index = parts->avail[1];
    int64_t start = now();
    while (rounds--) {
        offer(parts, index++);
        int result = pop(ring, chain);
        if (result != 1)
            return -1000 + result;
        result = push(ring, *generation, *head, 1);
        if (result)
            return -2000 + result;
    }
    return now() - start;
}

/* The same by a device that trusts its driver: no checks, no addresses, no lock. */
int64_t vring_least(struct parts *parts, uint64_t rounds, uint64_t *sum)
{
    uint16_t index = parts->avail[1];
    int64_t start = now();
    while (rounds--) {
        offer(parts, index);
        uint16_t seen = __atomic_load_n(&parts->avail[1], __ATOMIC_ACQUIRE);
        if (seen == index)
            return -1;
        uint16_t head = parts->avail[2 + (index & (parts->size - 1))];
        for (uint16_t at = head;;) {
            const struct descriptor *descriptor = &parts->desc[at];
            *sum += descriptor->gpa + descriptor->length;
            if (!(descriptor->flags & 1))
                break;
            at = descriptor->next;
        }
        uint32_t element[2] = {head, 1};
        memcpy(&parts->used[2 + 4 * (index & (parts->size - 1))], element, sizeof element);
        index++;
        __atomic_store_n(&parts->used[1], index, __ATOMIC_RELEASE);
    }
    return now() - start;
}
