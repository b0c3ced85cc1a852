/* seam/virtio.h - guest memory, virtqueues and plain block requests. */
#ifndef PYKVM_SEAM_VIRTIO_H
#define PYKVM_SEAM_VIRTIO_H

#include "devices.h"

/* cdef: begin */

/* ---- guest memory, as C sees it -------------------------------------------------------------- */

struct pykvm_ram_region {
    uint64_t first; /* guest-physical address */
    uint64_t last;  /* inclusive */
    uint8_t *host;
    uint64_t *touched; /* bitmap of pages that are written, or NULL: nobody wants to know */
    uint32_t id;       /* stays the same from map to map */
    uint32_t readonly;
};

/* Sorted by `first`, without overlap.  Never changes: a new one takes its place. */
struct pykvm_ram_map {
    uint32_t count;
    struct pykvm_ram_region *regions;
};

/* Old maps stay valid, and so do their regions: RAM is never taken away while devices run. */
struct pykvm_ram {
    struct pykvm_ram_map *map;
};

/* ---- a split virtqueue (virtio 1.2, 2.7), from the device's side ----------------------------- */

/* What a driver did that it must not. */
enum pykvm_breach {
    PYKVM_BREACH_SIZE = -1,      /* the queue's size is no power of two, or above the maximum */
    PYKVM_BREACH_ALIGN = -2,     /* a part of the ring is not aligned */
    PYKVM_BREACH_RING = -3,      /* a part of the ring is not in (writable) RAM */
    PYKVM_BREACH_INDEX = -4,     /* more chains were made available than the ring has entries */
    PYKVM_BREACH_FLIGHT = -5,    /* ... than it has descriptors, with those not given back yet */
    PYKVM_BREACH_HEAD = -6,      /* a chain begins outside the descriptor table */
    PYKVM_BREACH_NEXT = -7,      /* it goes on outside its table */
    PYKVM_BREACH_LOOP = -8,      /* it has more descriptors than its table */
    PYKVM_BREACH_BUFFER = -9,    /* a buffer is not in RAM, or not in writable RAM */
    PYKVM_BREACH_ORDER = -10,    /* a device-readable descriptor follows a device-writable one */
    PYKVM_BREACH_TOTAL = -11,    /* the chain has more than 2**32 bytes */
    PYKVM_BREACH_INDIRECT = -12, /* an indirect table where there may be none */
    PYKVM_BREACH_TABLE = -13,    /* an indirect table of a wrong length, or not in RAM */
    PYKVM_BREACH_LONG = -14,     /* the chain has more pieces than the device takes */
};

enum pykvm_vring_part { PYKVM_DESC, PYKVM_DRIVER, PYKVM_DEVICE };

/* A part of the ring.  `host` is NULL where it spans regions; each element lies in one. */
struct pykvm_vring_part_at {
    uint64_t gpa;
    uint8_t *host;
};

struct pykvm_vring {
    struct pykvm_ram *ram;
    struct pykvm_vring_part_at part[3]; /* by enum pykvm_vring_part */
    uint32_t lock;        /* spin lock over all of it */
    uint32_t generation;  /* counts resets: what was popped before the last one is stale */
    uint32_t in_flight;   /* chains popped and not pushed yet */
    uint16_t size;        /* a power of two */
    uint16_t next_avail;  /* number of the entry that is popped next */
    uint16_t avail_seen;  /* the driver's index when it was read last */
    uint16_t used;        /* our index */
    uint16_t signalled;   /* our index when an interrupt was considered last */
    uint8_t signalled_valid;
    uint8_t enabled;
    uint8_t event_idx;    /* VIRTIO_F_EVENT_IDX */
    uint8_t indirect;     /* VIRTIO_F_INDIRECT_DESC */
    uint8_t quiet;        /* the driver was told not to notify */
};

/* A stretch of guest memory within one region. */
struct pykvm_segment {
    uint64_t offset;
    uint32_t length; /* never 0 */
    uint16_t region; /* its id */
    uint16_t writable;
};

/* A chain as it was popped.  Python allocates it, with room for `capacity` segments. */
struct pykvm_chain {
    struct pykvm_segment *segments;
    uint32_t capacity;
    uint32_t count;
    uint32_t readable; /* so many of them, the first, are device-readable */
    uint32_t generation;
    uint32_t head;
    uint32_t reserved;
    uint64_t read_bytes;
    uint64_t write_bytes;
};

/* Begin to use the ring at the parts' addresses, from both indices 0: 0, or enum pykvm_breach. */
int pykvm_vring_enable(struct pykvm_vring *ring);
/* Use it no more.  What is in flight becomes stale. */
void pykvm_vring_disable(struct pykvm_vring *ring);
/*
 * Take the next chain, whole and checked: 1; 0 if there is none, and then the driver will notify of
 * the next one; or enum pykvm_breach, and nothing was taken.  One thread at a time.
 */
int pykvm_vring_pop(struct pykvm_vring *ring, struct pykvm_chain *chain);
/* Give a chain back, from any thread, in any order: 0, or -ESTALE and nothing was done. */
int pykvm_vring_push(struct pykvm_vring *ring, uint32_t generation, uint32_t head,
                     uint32_t written);
/* Whether the driver wants an interrupt for what was pushed since this was asked last. */
int pykvm_vring_should_interrupt(struct pykvm_vring *ring);
/* Whether chains wait; if not, the driver will notify of the next one. */
int pykvm_vring_waiting(struct pykvm_vring *ring);

/* ---- plain block requests: blk.c ------------------------------------------------------------- */

enum {
    PYKVM_INTERRUPT_PYTHON = -1, /* as an fd: Python raises it */
    PYKVM_INTERRUPT_NONE = -2,   /* the driver polls */
};

/* An interrupt that C can raise by itself. */
struct pykvm_interrupt {
    uint32_t lock;
    int32_t fd;                 /* an eventfd, or one of the above */
    struct pykvm_latch *latch;  /* gets `bits` before; or NULL */
    uint32_t bits;
};

/* 0, or -1: Python has to. */
int pykvm_interrupt_raise(struct pykvm_interrupt *interrupt);
void pykvm_interrupt_set(struct pykvm_interrupt *interrupt, int32_t fd);

#define PYKVM_BLK_VECTORS 1024
#define PYKVM_BLK_BUCKETS 40

struct pykvm_blk_queue {
    struct pykvm_vring *ring;
    struct pykvm_chain *chain;
    struct pykvm_interrupt *interrupt;
    int32_t doorbell;        /* an eventfd, or -1 */
    uint32_t left;           /* requests that may still be taken for this doorbell */
    uint8_t handed;          /* `chain` was popped and is Python's; none is popped until it is not */
    uint8_t wants_interrupt; /* Python is to raise it */
};

struct pykvm_blk {
    uint64_t lock[8]; /* held while requests are served, and while any of this changes */
    struct pykvm_blk_queue *queues;
    uint32_t count;
    int32_t fd;       /* the file */
    uint64_t bytes;   /* of it, whole blocks */
    uint32_t block;   /* what is moved is multiples of it */
    int32_t flush_error; /* of the first fdatasync that failed */
    uint8_t active;   /* the driver is ready */
    uint8_t paused;   /* doorbells are left to Python */
    uint8_t can_write; /* writes may be volatile until the next flush */
    uint8_t can_flush;
    uint8_t dirty;    /* something was written since the last flush */
    uint64_t requests; /* counters, as counters.py has them */
    uint64_t bytes_in;
    uint64_t bytes_out;
    uint64_t errors;
    uint64_t notifies;
    uint64_t interrupts;
    uint64_t latency_total;
    uint64_t latency_longest;
    uint64_t buckets[40]; /* PYKVM_BLK_BUCKETS */
    uint64_t vectors[2048]; /* scratch: PYKVM_BLK_VECTORS of struct iovec */
};

enum {
    PYKVM_BLK_DONE,
    PYKVM_BLK_MORE,   /* more requests wait */
    PYKVM_BLK_PYTHON, /* a chain was handed over, or an interrupt is to be raised */
};

void pykvm_blk_init(struct pykvm_blk *blk);
void pykvm_blk_lock(struct pykvm_blk *blk); /* may be taken again by who has it */
void pykvm_blk_unlock(struct pykvm_blk *blk);
/*
 * Serve a queue, at most its size in requests, or with `go_on` what is left of that: see above, or
 * enum pykvm_breach.
 */
int pykvm_blk_serve(struct pykvm_blk *blk, uint32_t index, int go_on);
/*
 * Wait as epoll_wait does, and serve queues whose doorbells ring, until something else is ready or
 * Python is needed: which descriptors, at most 16, are ready; 0 after the time; or -errno.
 */
int pykvm_blk_poll(struct pykvm_blk *blk, int epoll_fd, int timeout_ms, int32_t *ready);

/* cdef: end */

#endif
