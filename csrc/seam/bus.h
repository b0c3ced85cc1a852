/* seam/bus.h - who serves which addresses, what C does by itself, and rings to and from Python. */
#ifndef PYKVM_SEAM_BUS_H
#define PYKVM_SEAM_BUS_H

#include <stdint.h>

/* cdef: begin */

/* ---- actions: what C does with an access, without Python ------------------------------------- */

enum pykvm_action {
    PYKVM_PYTHON,   /* return to Python, which has a handler in the range's slot */
    PYKVM_IGNORE,   /* writes vanish; reads answer all ones, as an empty bus does */
    PYKVM_CONSTANT, /* reads answer the range's value; writes vanish */
    PYKVM_LOG,      /* a struct pykvm_record goes into the ring `out`; reads answer the value */
    PYKVM_FIFO,     /* writes append their bytes to `out`; reads take theirs from `in`, or, when
                       that is empty, answer the value */
    PYKVM_EVENTFD,  /* 1 is added to the eventfd `fd`; reads answer the value */
    PYKVM_STOP,     /* return to Python: PYKVM_STOPPED */
    PYKVM_UART,     /* registers of the struct pykvm_uart `device` */
    PYKVM_CLOCK,    /* reads answer the time of the struct pykvm_clock `device`; writes vanish */
    PYKVM_LATCH,    /* registers of the struct pykvm_latch `device` */
    PYKVM_PCI_ADDRESS, /* the address register of the struct pykvm_pci `device` */
    PYKVM_PCI_DATA,    /* its data register; reads only, and those of `live` go to Python */
    PYKVM_BLK,         /* a write is the number of the queue of the struct pykvm_blk `device` to
                          serve, which Python does as far as C cannot; reads answer the value */
};

/* One access as LOG writes it down; 32 bytes. */
struct pykvm_record {
    uint64_t address; /* port or guest-physical address */
    uint64_t value;   /* what was written, or what the read was answered with */
    uint64_t exit;    /* the vCPU's exit count at the time */
    uint32_t vcpu;    /* which vCPU */
    uint8_t size;     /* bytes: 1, 2, 4, 8 (MMIO: any of 1..8) */
    uint8_t is_write;
    uint16_t reserved;
};

/* ---- rings (ring.c) -------------------------------------------------------------------------- */

/*
 * A ring of items from vCPU threads to Python, or back.  Python allocates it, with `capacity`
 * (a power of two) items behind `items`.  A push onto an empty ring adds 1 to `eventfd` if that
 * is not -1.  A full ring loses nothing: the access waits and Python is asked to drain.
 */
struct pykvm_ring {
    uint32_t lock; /* spin lock, held for some tens of nanoseconds */
    uint32_t item_size;
    uint32_t capacity;
    int32_t eventfd;
    uint32_t more; /* Python holds more items that did not fit: ask it when the ring is empty */
    uint32_t reserved;
    uint64_t head; /* items ever pushed */
    uint64_t tail; /* items ever popped */
    uint8_t *items;
};

/* Push `count` items, all or none: 0, or -ENOSPC. */
int pykvm_ring_push(struct pykvm_ring *ring, const void *items, uint32_t count);
/* Pop up to `max` items: how many. */
uint32_t pykvm_ring_pop(struct pykvm_ring *ring, void *items, uint32_t max);

/* ---- sorted ranges (bus.c) ------------------------------------------------------------------- */

struct pykvm_range {
    uint64_t first; /* first port or guest-physical address */
    uint64_t last;  /* the last one, inclusive */
    uint64_t value; /* what CONSTANT (and others, see above) answer */
    struct pykvm_ring *out;
    struct pykvm_ring *in;
    uint64_t hits;  /* every access, whoever serves it; the one field that changes */
    void *device;   /* of an action that names one */
    int32_t fd;     /* EVENTFD */
    uint16_t slot;  /* of the Python handler, below PYKVM_SLOTS */
    uint8_t on_read;
    uint8_t on_write;
};

/* Sorted by `first`, without overlap.  A table never changes: a new one takes its place. */
struct pykvm_table {
    uint32_t count;
    struct pykvm_range **ranges;
    struct pykvm_range *rest; /* serves every address that no range has; or NULL */
};

/* cdef: end */

#endif
