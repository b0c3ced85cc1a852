/*
 * blk.c - plain block requests (virtio 1.2, 5.2.6) without Python: a queue is popped, the file is
 * read, written or flushed, and the queue is pushed and interrupts, in one call.
 *
 * Only what is framed as every driver frames it, lies within the file and does not fail in a way
 * that takes thought is served here.  Any other request is left as it was popped, for Python, which
 * starts it from the beginning.  As in vring.c, what lies in guest memory is read once.
 */
#define _GNU_SOURCE
#include "pykvm.h"

#include <errno.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/uio.h>
#include <unistd.h>

enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, S_OK = 0, S_IOERR = 1 };

#define SECTOR 512
#define HEADER 16
#define MAX_TRANSFER (UINT64_C(64) << 20) /* as blk_request.py has it */
#define EVENTS 16

_Static_assert(sizeof(pthread_mutex_t) <= sizeof ((struct pykvm_blk *)0)->lock, "room for a lock");
_Static_assert(sizeof(struct iovec) == 2 * sizeof(uint64_t), "room for the vectors");

static pthread_mutex_t *mutex(struct pykvm_blk *blk)
{
    return (pthread_mutex_t *)blk->lock;
}

void pykvm_blk_init(struct pykvm_blk *blk)
{
    pthread_mutexattr_t kind;
    pthread_mutexattr_init(&kind);
    pthread_mutexattr_settype(&kind, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(mutex(blk), &kind);
    pthread_mutexattr_destroy(&kind);
}

void pykvm_blk_lock(struct pykvm_blk *blk)
{
    pthread_mutex_lock(mutex(blk));
}

void pykvm_blk_unlock(struct pykvm_blk *blk)
{
    pthread_mutex_unlock(mutex(blk));
}

/* ---- interrupts ------------------------------------------------------------------------------- */

int pykvm_interrupt_raise(struct pykvm_interrupt *interrupt)
{
    uint64_t one = 1;
    int result = -1;
    pykvm_spin_lock(&interrupt->lock);
    if (interrupt->fd != PYKVM_INTERRUPT_PYTHON) {
        if (interrupt->latch) /* before the edge: the driver looks at the status after it */
            pykvm_latch_set(interrupt->latch, interrupt->bits);
        /* A counter at its ceiling has long been seen. */
        if (interrupt->fd >= 0 && write(interrupt->fd, &one, sizeof one) < 0 && errno != EAGAIN)
            result = -1;
        else
            result = 0;
    }
    pykvm_spin_unlock(&interrupt->lock);
    return result;
}

void pykvm_interrupt_set(struct pykvm_interrupt *interrupt, int32_t fd)
{
    pykvm_spin_lock(&interrupt->lock);
    interrupt->fd = fd;
    pykvm_spin_unlock(&interrupt->lock);
}

/* ---- one request ------------------------------------------------------------------------------ */

static uint8_t *host(const struct pykvm_ram_map *map, const struct pykvm_segment *segment)
{
    for (uint32_t i = 0; i < map->count; i++)
        if (map->regions[i].id == segment->region)
            return map->regions[i].host + segment->offset;
    return NULL;
}

/* The request's data as vectors, the last one shorter by `less`: how many, or -1. */
static int vectors(const struct pykvm_ram_map *map, const struct pykvm_segment *from,
                   uint32_t count, uint32_t less, struct iovec *iov)
{
    uint32_t used = 0;
    if (count > PYKVM_BLK_VECTORS)
        return -1;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t length = from[i].length - (i + 1 == count ? less : 0);
        uint8_t *base = host(map, &from[i]);
        if (!base)
            return -1;
        if (length)
            iov[used++] = (struct iovec){.iov_base = base, .iov_len = length};
    }
    return (int)used;
}

/* Read or write the file: a status, or -1: Python is to do it. */
static int transfer(struct pykvm_blk *blk, const struct iovec *iov, int count, uint64_t length,
                    uint64_t offset, int is_write)
{
    ssize_t done = 0;
    if (length) {
        do
            done = is_write ? pwritev(blk->fd, iov, count, (off_t)offset)
                            : preadv(blk->fd, iov, count, (off_t)offset);
        while (done < 0 && errno == EINTR);
    }
    if (done >= 0)
        return (uint64_t)done == length ? S_OK : -1;
    return errno == EIO || errno == ENOSPC ? S_IOERR : -1;
}

static int flush(struct pykvm_blk *blk)
{
    if (!blk->can_flush)
        return -1;
    if (blk->dirty) {
        blk->dirty = 0;
        if (fdatasync(blk->fd)) { /* never again: see RawDisk.flush */
            blk->flush_error = errno;
            blk->can_flush = 0;
            return -1;
        }
    }
    return S_OK;
}

/* The header may lie at an odd address. */
struct anywhere {
    uint64_t word;
} __attribute__((packed, may_alias));

/* Serve what was popped: 0 and how many bytes were written, or -1: it is Python's. */
static int serve_one(struct pykvm_blk *blk, struct pykvm_blk_queue *queue, uint32_t *written)
{
    const struct pykvm_chain *chain = queue->chain;
    const struct pykvm_segment *segments = chain->segments;
    const struct pykvm_ram_map *map = __atomic_load_n(&queue->ring->ram->map, __ATOMIC_ACQUIRE);
    struct iovec *iov = (struct iovec *)blk->vectors;
    if (!chain->readable || chain->readable == chain->count || segments[0].length != HEADER)
        return -1;
    const struct pykvm_segment *last = &segments[chain->count - 1];
    uint8_t *from = host(map, &segments[0]), *status = host(map, last);
    if (!from || !status)
        return -1;
    const volatile struct anywhere *words = (struct anywhere *)from; /* volatile: one load each */
    uint32_t type = (uint32_t)words[0].word;
    uint64_t sector = words[1].word;

    int is_write = type == T_OUT, result;
    uint64_t length = 0;
    if (type == T_FLUSH) {
        result = flush(blk);
    } else if (type == T_IN || (is_write && blk->can_write)) {
        length = is_write ? chain->read_bytes - HEADER : chain->write_bytes - 1;
        uint64_t offset = sector * SECTOR;
        if (sector > blk->bytes / SECTOR || length > blk->bytes - offset ||
            length > MAX_TRANSFER || (offset | length) % blk->block)
            return -1;
        int count = is_write ? vectors(map, segments + 1, chain->readable - 1, 0, iov)
                             : vectors(map, segments + chain->readable,
                                       chain->count - chain->readable, 1, iov);
        if (count < 0)
            return -1;
        if (is_write && length)
            blk->dirty = 1;
        result = transfer(blk, iov, count, length, offset, is_write);
    } else {
        return -1;
    }
    if (result < 0)
        return -1;
    status[last->length - 1] = (uint8_t)result;
    if (result != S_OK)
        blk->errors++;
    /* What counts is written without a gap from the first byte on (2.7.8.2). */
    *written = !is_write && result == S_OK ? (uint32_t)length : 0;
    if (*written == chain->write_bytes - 1)
        ++*written;
    return 0;
}

static void count_one(struct pykvm_blk *blk, const struct pykvm_chain *chain, uint32_t written,
                      int64_t ns)
{
    uint64_t time = ns > 0 ? (uint64_t)ns : 0;
    unsigned bucket = time ? 64 - (unsigned)__builtin_clzll(time) : 0;
    blk->bytes_in += written;
    blk->bytes_out += chain->read_bytes;
    blk->latency_total += time;
    if (time > blk->latency_longest)
        blk->latency_longest = time;
    blk->buckets[bucket < PYKVM_BLK_BUCKETS ? bucket : PYKVM_BLK_BUCKETS - 1]++;
    blk->requests++;
}

/* ---- a queue ---------------------------------------------------------------------------------- */

/* What a doorbell has done: at most as many requests as the queue has entries, `left` of them. */
static int serve(struct pykvm_blk *blk, struct pykvm_blk_queue *queue)
{
    int result = PYKVM_BLK_MORE;

    if (!blk->active)
        return PYKVM_BLK_DONE;
    if (queue->handed)
        return PYKVM_BLK_PYTHON;
    for (; queue->left; queue->left--) {
        uint32_t written = 0;
        int popped = pykvm_vring_pop(queue->ring, queue->chain);
        if (popped <= 0) {
            result = popped;
            break;
        }
        int64_t began = pykvm_now();
        if (serve_one(blk, queue, &written)) {
            queue->left--;
            queue->handed = 1;
            return PYKVM_BLK_PYTHON; /* the interrupt is for the whole batch */
        }
        pykvm_vring_push(queue->ring, queue->chain->generation, queue->chain->head, written);
        count_one(blk, queue->chain, written, pykvm_now() - began);
    }
    if (result == PYKVM_BLK_MORE && !pykvm_vring_waiting(queue->ring))
        result = PYKVM_BLK_DONE;
    if (pykvm_vring_should_interrupt(queue->ring)) {
        if (!pykvm_interrupt_raise(queue->interrupt)) {
            blk->interrupts++;
        } else {
            queue->wants_interrupt = 1;
            if (result >= 0)
                result = PYKVM_BLK_PYTHON;
        }
    }
    return result;
}

static int serve_fresh(struct pykvm_blk *blk, struct pykvm_blk_queue *queue)
{
    if (!queue->handed)
        queue->left = queue->ring->size;
    return serve(blk, queue);
}

int pykvm_blk_serve(struct pykvm_blk *blk, uint32_t index, int go_on)
{
    if (index >= blk->count)
        return PYKVM_BLK_DONE;
    struct pykvm_blk_queue *queue = &blk->queues[index];
    pykvm_blk_lock(blk);
    int result = go_on ? serve(blk, queue) : serve_fresh(blk, queue);
    pykvm_blk_unlock(blk);
    return result;
}

/* ---- the I/O thread's wait --------------------------------------------------------------------- */

/* A descriptor is readable: whether it was a doorbell, and is served. */
static int rang(struct pykvm_blk *blk, int32_t fd)
{
    uint64_t rings;
    int ours = 0, done = 1;

    pykvm_blk_lock(blk);
    for (uint32_t i = 0; i < blk->count && !blk->paused; i++)
        ours |= blk->queues[i].doorbell == fd;
    if (ours && read(fd, &rings, sizeof rings) < 0 && errno != EAGAIN)
        ours = 0;
    blk->notifies += ours;
    for (uint32_t i = 0; ours && i < blk->count; i++)
        if (blk->queues[i].doorbell == fd && serve_fresh(blk, &blk->queues[i]) != PYKVM_BLK_DONE)
            done = 0;
    pykvm_blk_unlock(blk);
    return ours && done;
}

int pykvm_blk_poll(struct pykvm_blk *blk, int epoll_fd, int timeout_ms, int32_t *ready)
{
    struct epoll_event events[EVENTS];
    for (;;) {
        int left = 0, count = epoll_wait(epoll_fd, events, EVENTS, timeout_ms);
        if (count < 0)
            return errno == EINTR ? 0 : -errno;
        for (int i = 0; i < count; i++)
            if (!rang(blk, events[i].data.fd))
                ready[left++] = events[i].data.fd;
        if (left || !count)
            return left;
    }
}
