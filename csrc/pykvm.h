/*
 * pykvm.h - the whole seam between C and Python.
 *
 * C owns what happens on every exit (KVM_RUN, range look-up, rings, signals); Python owns policy
 * and device semantics.  Nothing here allocates memory that Python sees, calls back into Python or
 * ends the process.  Functions return 0 (or a count) on success and -errno on failure.
 *
 * An exit is either served here by an *action* and the guest goes on, or pykvm_vcpu_run() returns
 * and Python serves it; calling pykvm_vcpu_run() again passes the answer and goes on.
 */
#ifndef PYKVM_H
#define PYKVM_H

#include "pykvm_kvm.h" /* made at build: linux/kvm.h, and the names that it is too old to have */

#include <sched.h>
#include <stdint.h>

/* cdef: begin */

/* One ioctl: its result (>= 0), or -errno.  EINTR is not retried: signals must reach Python. */
int64_t pykvm_ioctl(int fd, unsigned long request, void *arg);

/* Map the pages that a vCPU's file descriptor shares: NULL, and errno, on failure. */
struct kvm_run *pykvm_run_map(int fd, uint64_t size);
void pykvm_run_unmap(struct kvm_run *run, uint64_t size);

/* ---- actions: what C does with an access, without Python ------------------------------------ */

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
    PYKVM_BLK,         /* a write is the number of the queue of the struct pykvm_blk `device` to serve,
                          which Python does as far as C cannot; reads answer the value */
    PYKVM_PCI_DATA,    /* its data register; reads only, and those of `live` go to Python */
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

/* ---- devices in C ---------------------------------------------------------------------------- */

/*
 * A 16550A UART.  Output goes to the ring `out`.  Input waits in `input`, whose items are a byte
 * and, above it, the line status bits that come with it.  Registers are named as in the data sheet
 * where they are plain; the others are made from what stands behind them.
 */
struct pykvm_uart {
    uint32_t lock;     /* spin lock over all of it */
    int32_t irq;       /* eventfd: 1 is added when the interrupt line rises; or -1 */
    int32_t consumed;  /* eventfd: 1 is added when the last of the input was read; or -1 */
    uint32_t capacity; /* items in `input`, a power of two */
    struct pykvm_ring *out;
    uint16_t *input;
    uint64_t head; /* items ever put into `input` */
    uint64_t tail; /* items ever read by the guest */
    uint8_t flow_control; /* input waits until the guest raises RTS */
    uint8_t ier;
    uint8_t fcr;
    uint8_t lcr;
    uint8_t mcr;
    uint8_t scratch;
    uint8_t divisor_low;
    uint8_t divisor_high;
    uint8_t errors;   /* of LSR: since it was last read */
    uint8_t deltas;   /* of MSR: since it was last read */
    uint8_t emptied;  /* "transmitter holding register empty" is still to be told */
    uint8_t line;     /* the interrupt line */
    uint8_t rose;     /* it has risen since `irq` was last signalled */
    uint8_t fifo_count; /* receiver FIFO: loopback only */
    uint8_t fifo_first;
    uint8_t fifo[16];
};

/* Input, from any thread: all of it, or -ENOSPC.  `errors`: LSR bits that come with each byte. */
int pykvm_uart_input(struct pykvm_uart *uart, const uint8_t *bytes, uint32_t count, uint8_t errors);
/* One access of the guest, at any width: 0, or -ENOSPC: `out` is full and nothing has happened. */
int pykvm_uart_access(struct pykvm_uart *uart, uint64_t offset, uint8_t *data, uint8_t size,
                      int is_write);

/* A counter that runs on CLOCK_MONOTONIC. */
struct pykvm_clock {
    uint64_t hz;
    uint64_t base; /* what it showed ... */
    int64_t start; /* ... at this time, in ns */
};

uint64_t pykvm_clock_read(const struct pykvm_clock *clock);

/*
 * Bits that are set by the device and taken back by the guest: a 32-bit register that reads them,
 * and behind it one that clears those written as ones.  Other widths and offsets read zero.
 */
struct pykvm_latch {
    uint32_t bits;
};

/* Set bits, from any thread. */
void pykvm_latch_set(struct pykvm_latch *latch, uint32_t bits);

/*
 * PCI configuration mechanism 1 (PCI Local Bus 3.0, 3.2.2.3.2): ports 0xcf8 and 0xcfc, and the
 * configuration space of function 0 of each device on bus 0.
 */
struct pykvm_pci {
    uint32_t address;    /* what was written to 0xcf8 */
    uint8_t *config[32]; /* 256 bytes by device number, or NULL: there is none */
    uint8_t live[32];    /* offset of four bytes that Python reads; 0: none */
};

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

/* ---- a split virtqueue (virtio 1.2, 2.7), from the device's side ------------------------------ */

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

/* ---- plain block requests: blk.c -------------------------------------------------------------- */

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

/* ---- the bus: sorted ranges ------------------------------------------------------------------ */

struct pykvm_range {
    uint64_t first; /* first port or guest-physical address */
    uint64_t last;  /* the last one, inclusive */
    uint64_t value; /* what CONSTANT (and others, see above) answer */
    struct pykvm_ring *out;
    struct pykvm_ring *in;
    uint64_t hits;  /* every access, whoever serves it; the one field that changes */
    void *device;   /* UART, CLOCK */
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

/* ---- watching: exits as they happen, and stops planted in the code --------------------------- */

/* One exit, as it was taken and what became of it; 64 bytes. */
struct pykvm_event {
    int64_t time;     /* when KVM_RUN returned, by pykvm_events_now() */
    uint64_t inside;  /* that KVM_RUN took */
    uint64_t spent;   /* from then on until the next KVM_RUN, or the end of the run */
    uint64_t rip;     /* with PYKVM_EVENT_RIP */
    uint64_t address; /* port, gpa or MSR; the number of a hypercall; pc of a debug exit */
    uint64_t data;    /* written, or read in answer: the first 8 bytes, the first item's first */
    uint32_t exit;    /* the vCPU's exit count, its low 32 bits */
    uint16_t reason;  /* KVM_EXIT_*; above 65534: 65535 */
    uint16_t count;   /* items of a string instruction; else 1 */
    uint8_t size;     /* bytes of an item, or 0 */
    uint8_t flags;    /* enum pykvm_event_flag */
    uint16_t reserved[3];
};

enum pykvm_event_flag {
    PYKVM_EVENT_WRITE = 1,
    PYKVM_EVENT_RIP = 2,
    PYKVM_EVENT_DONE = 4, /* it was served: `spent` counts, and so does `data` of a read */
};

/* An exit that is wanted. */
struct pykvm_event_filter {
    uint64_t first; /* of `address`, inclusive */
    uint64_t last;
    uint32_t reason; /* KVM_EXIT_*, or UINT32_MAX: any */
    uint8_t direction; /* 0: both, 1: writes, 2: reads and what has no direction */
};

/*
 * The last `capacity` (a power of two) exits of one vCPU that a filter wants; without filters all.
 * One vCPU's thread writes; anybody may read what is more than one behind `head`, and finds out by
 * a second look at `head` whether it was overwritten meanwhile.
 */
struct pykvm_events {
    struct pykvm_event *events;
    struct pykvm_event_filter *filters;
    uint32_t capacity;
    uint32_t filter_count;
    uint64_t head;      /* events ever written */
    uint64_t passed;    /* exits that no filter wanted */
    int64_t entered;    /* when KVM_RUN was called last */
    uint8_t rip;        /* have KVM store the registers at every exit */
    uint8_t open;       /* the last event's exit is being served */
    uint8_t ticks;      /* time is the TSC: it costs no pages that an exit has made cold */
};

/* The time as `events` have it: TSC ticks, or CLOCK_MONOTONIC in ns. */
int64_t pykvm_events_now(const struct pykvm_events *events);

/*
 * Stops planted in the code are one-byte INs (0xEC, IN AL,DX): they exit on every back end, whatever
 * DX.  The low 12 bits of an address are the same before and after paging, so this says which INs
 * may be one of them.
 */
struct pykvm_planted {
    uint64_t offsets[64]; /* bit n: one is at offset n of a page */
};

/* ---- a vCPU ---------------------------------------------------------------------------------- */

/*
 * The access being served.  A string instruction makes one exit with `count` items; each item is
 * an access of its own.
 */
struct pykvm_access {
    uint64_t address;
    uint64_t value;  /* of a write; 0 for a read */
    uint64_t offset; /* address - first address of the range */
    uint8_t *data;   /* in the run page: where the item lies */
    uint32_t count;
    uint32_t index;
    uint16_t slot;
    uint8_t size;
    uint8_t is_write;
    uint8_t is_mmio;
    uint8_t pending; /* enum pykvm_pending */
};

enum pykvm_pending {
    PYKVM_IDLE,       /* nothing: enter the guest */
    PYKVM_UNSERVED,   /* an exit was taken and is still to be dispatched */
    PYKVM_RETRY,      /* the same item again (its ring was full, or Python never got to it) */
    PYKVM_UNANSWERED, /* it was returned; the next call brings its answer */
    PYKVM_ASKED,      /* the same, and a handler has seen it */
    PYKVM_HANDED,     /* Python has another exit (PYKVM_EXIT); the next call goes on */
    PYKVM_SEEN,       /* the same, and a hook has seen it */
};

enum pykvm_stop {
    PYKVM_STOP_NOT,
    PYKVM_STOP_OTHER, /* by another thread, or before the run */
    PYKVM_STOP_OWN,   /* by a handler of its own: once the instruction is complete */
};

struct pykvm_vcpu {
    struct kvm_run *run;
    struct pykvm_table *pio; /* swapped whole, also while running */
    struct pykvm_table *mmio;
    int (*enter)(struct pykvm_vcpu *vcpu); /* pykvm_vcpu_enter; tests and benches put a fake here */
    void *fake;
    uint64_t entries;    /* times the guest was entered, also in vain */
    uint64_t exits;      /* exits the guest made */
    uint64_t exit_limit; /* PYKVM_LIMIT once `exits` reaches it */
    int64_t deadline;    /* CLOCK_MONOTONIC in ns; INT64_MAX: none */
    struct pykvm_access access;
    struct pykvm_events *events;   /* a trace of the exits, or NULL */
    struct pykvm_planted *planted; /* look for stops in the code, or NULL */
    struct pykvm_vcpu *outer; /* the run that this one is nested in, in the same thread */
    uint32_t hint[2];         /* index of the range hit last: PIO, MMIO */
    uint32_t index;           /* which vCPU, for records */
    int32_t fd;
    int32_t tid;       /* the thread between begin and end, or 0 */
    int32_t error;     /* positive errno of the last failed KVM_RUN */
    uint64_t owner;    /* the thread that uses it for a run (Python ident), PYKVM_RESERVED or 0 */
    uint32_t stop;     /* somebody asked the run to end: enum pykvm_stop */
    uint8_t sync_regs; /* KVM_CAP_SYNC_REGS: else pykvm_vcpu_enter() does its work by ioctls */
    uint8_t trace;     /* return PYKVM_TRACED after every KVM_RUN, before serving the exit */
    uint8_t guests_own;      /* the exit being served is an IN that is no planted stop */
};

/* What pykvm_vcpu_run() returns. */
enum pykvm_outcome {
    PYKVM_ACCESS = 0,       /* an access for the handler in vcpu->access.slot */
    PYKVM_EXIT = -1,        /* another exit: see run->exit_reason (error is set: MEMORY_FAULT) */
    PYKVM_UNCLAIMED = -2,   /* no range has this address; answer as if it were a handler's */
    PYKVM_STOPPED = -3,     /* an access hit a STOP range */
    PYKVM_FULL = -4,        /* a ring is full, or empty with more to come: see to it, call again */
    PYKVM_LIMIT = -5,       /* exit_limit reached */
    PYKVM_TIMEOUT = -6,     /* deadline passed */
    PYKVM_KICKED = -7,      /* pykvm_vcpu_stop() was called */
    PYKVM_INTERRUPTED = -8, /* a signal, or the heartbeat: let Python look at its signals */
    PYKVM_FAILED = -9,      /* KVM_RUN failed: vcpu->error */
    PYKVM_TRACED = -10,     /* KVM_RUN returned; call again to have its exit served */
    PYKVM_STRUCK = -11,     /* an IN that may be a planted stop; RIP, RAX and CS are in the run page.
                               To have it served as the guest's own, set access.pending to
                               PYKVM_UNSERVED and `guests_own` to 1 */
};

enum {
    PYKVM_SLOTS = 4096,
    PYKVM_RESERVED = 1, /* the owner of a vCPU that a thread is about to run */
    PYKVM_HEARTBEAT_MS = 500, /* the longest that a signal can wait for Python */
};

/*
 * Bind the vCPU to the calling thread until pykvm_vcpu_end(): from here on a stop or the deadline
 * interrupts it.  Runs nest: a handler may run another machine.  0 or -errno (EBUSY: it is bound
 * already; EEXIST: the kick signal has a handler that is not ours).  The end of a vCPU that the
 * thread did not begin last does nothing.  `stop` outlives the end: who ends a run clears it.
 */
int pykvm_vcpu_begin(struct pykvm_vcpu *vcpu, int64_t deadline);
void pykvm_vcpu_end(struct pykvm_vcpu *vcpu);

/*
 * Run until Python is needed: enum pykvm_outcome.  If the last call returned a read, the low bytes of
 * `answer` answer it; all ones are what an empty bus says.
 */
int64_t pykvm_vcpu_answer(struct pykvm_vcpu *vcpu, uint64_t answer);

/* The same, for who has no answer: all ones. */
int64_t pykvm_vcpu_run(struct pykvm_vcpu *vcpu);

/* Make the module pykvm._abi._cpython (csrc/cpython.h), for `import` to find: 0, or -1. */
int pykvm_cpython_init(void);

/* Ask a run, or if there is none the next one, to end: from any thread, also a handler's own. */
void pykvm_vcpu_stop(struct pykvm_vcpu *vcpu);

/* Have a run of another thread leave the guest and enter it anew, soon: for who waits for that. */
void pykvm_vcpu_nudge(struct pykvm_vcpu *vcpu);

/* The `enter` of a real vCPU: one KVM_RUN.  0 or -errno. */
int pykvm_vcpu_enter(struct pykvm_vcpu *vcpu);

/* The signal that interrupts KVM_RUN. */
int pykvm_kick_signal(void);

/* ---- a fake KVM_RUN, for tests and benches without /dev/kvm ---------------------------------- */

struct pykvm_fake_exit {
    uint64_t address;
    uint8_t data[16]; /* of a write; of a read, what the run answered */
    uint32_t reason;  /* KVM_EXIT_* */
    int32_t error;    /* nonzero: KVM_RUN fails with this errno */
    uint32_t count;   /* items, PIO only; size * count <= 16 */
    uint8_t size;
    uint8_t is_write;
    uint8_t stop;     /* call pykvm_vcpu_stop() during this entry */
    uint8_t signal;   /* raise this signal during this entry; 0: none */
};

/* vcpu->fake points here; the script repeats for ever. */
struct pykvm_fake {
    struct pykvm_fake_exit *script;
    struct pykvm_fake_exit *last;
    uint32_t count;
    uint32_t next;
};

int pykvm_fake_enter(struct pykvm_vcpu *vcpu);

/* ---- snapshots: putting a machine back (reset.c) --------------------------------------------- */

/* A slot of guest memory and what it was. Bitmaps have a bit a page, in whole words. */
struct pykvm_reset_slot {
    uint8_t *memory;      /* the guest's */
    const uint8_t *image; /* what it was ... */
    const uint64_t *held; /* ... of these pages; the others were zeros */
    uint64_t *dirty;      /* room for KVM's log */
    uint64_t *touched;    /* pages that the host has written since the last reset, which clears it */
    const uint64_t *pagemap; /* when all is looked at: of /proc/PID/pagemap, or NULL; what is not
                                there and was zeros need not be */
    uint64_t *exposed;    /* pages that somebody may write unseen: looked at every time */
    uint64_t pages;
    uint32_t slot;
    uint16_t logged;      /* KVM logs its pages */
    uint16_t whole;       /* whatever KVM's log says, look at all of it, once */
};

enum pykvm_reset_mode {
    PYKVM_RESET_WHOLE,  /* no log: look at every page */
    PYKVM_RESET_LOG,    /* KVM_GET_DIRTY_LOG, which protects the pages anew */
    PYKVM_RESET_MANUAL, /* the same with KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: they stay writable */
};

/* An ioctl that brings a part of the state back, in the order of the array. */
struct pykvm_reset_call {
    uint64_t request;
    void *arg;
    int64_t expected; /* what it returns */
    int32_t fd;
    uint32_t is_tsc;  /* arg is a kvm_device_attr of a TSC offset: `offset` as of host TSC `then` */
    uint64_t offset;
    uint64_t then;
};

struct pykvm_reset_vcpu {
    struct pykvm_vcpu *vcpu;
    struct kvm_sync_regs *saved;
    uint64_t sync; /* KVM_SYNC_X86_*: what goes by the run page */
    uint64_t seen; /* of these the run page holds what the vCPU has: only what changed is put back */
};

struct pykvm_reset {
    struct pykvm_reset_slot *slots;
    struct pykvm_reset_call *calls;
    struct pykvm_reset_vcpu *vcpus;
    uint32_t slot_count;
    uint32_t call_count;
    uint32_t vcpu_count;
    int32_t vm_fd;
    uint32_t mode;
    uint32_t failed;    /* index of the call that failed */
    int64_t result;     /* what it returned */
    uint8_t **plants;   /* places in memory that hold `plant` whatever the images say: stops */
    uint32_t plant_count;
    uint32_t plant;
    uint64_t patience;  /* clean pages to look at for every page that would fault anew */
    uint64_t waste;     /* clean pages looked at since the log was cleared */
    uint64_t differing; /* pages that differed when they were last compared */
    uint64_t resets;
    uint64_t looked;    /* pages looked at, ever */
    uint64_t copied;    /* pages written, ever */
    uint64_t cleared;   /* times the log was cleared, ever */
};

enum { PYKVM_RESET_COMPARE = 8 }; /* every so many resets pages are compared instead of copied */

/* Put everything back: 0; -EAGAIN: an access of a vCPU is open, and Python must see to it; -errno,
   and `failed` says of which call (the one after the last: KVM's log; then the vCPUs). */
int pykvm_reset(struct pykvm_reset *reset);
/* The memory alone. */
int pykvm_reset_memory(struct pykvm_reset *reset);
/*
 * Write those pages that are not all zeros to a file: how many, or -errno.  `pagemap`: as in
 * /proc/PID/pagemap; what is neither present nor swapped out, nor in the bitmap `below` if that is
 * not NULL, is left out; NULL: look at every page.
 */
int64_t pykvm_image_write(int fd, int64_t offset, const uint8_t *memory, uint64_t pages,
                          const uint64_t *pagemap, const uint64_t *below, uint64_t *held);
/* Mark in `differs` the pages that differ between two images; either `held` may be NULL: all. */
uint64_t pykvm_image_diff(const uint8_t *a, const uint64_t *held_a, const uint8_t *b,
                          const uint64_t *held_b, uint64_t pages, uint64_t *differs);
uint64_t pykvm_tsc(void);
/* Set bits of a bitmap of pages, from any thread. */
void pykvm_pages_mark(uint64_t *bitmap, uint64_t first, uint64_t count);

/* ---- fuzzing: input after input, without Python (fuzz.c) -------------------------------------- */

struct pykvm_outcome_record {
    int64_t outcome;  /* enum pykvm_outcome */
    uint64_t rip;     /* where it ended */
    uint64_t exits;
    uint64_t value;   /* of the access that ended it */
    uint64_t address; /* its port or guest-physical address */
    uint32_t reason;  /* KVM_EXIT_*, of PYKVM_EXIT */
    uint32_t fresh;   /* cells of the coverage map that no input before had reached */
};

struct pykvm_fuzz {
    struct pykvm_reset *reset;
    struct pykvm_vcpu *vcpu;
    const uint8_t *inputs;   /* one after the other ... */
    const uint64_t *ends;    /* ... and where each ends */
    struct pykvm_outcome_record *outcomes;
    uint8_t *to;             /* where in memory the input goes */
    uint64_t room;           /* bytes there */
    uint8_t *length_to;      /* 8 bytes for its length, or NULL */
    struct pykvm_reset_slot *slot, *length_slot; /* whose pages these are */
    uint64_t at, length_at;  /* and where in it, in bytes */
    const uint8_t *map;      /* coverage: bytes that the guest (or a tool) counts in, or NULL */
    uint8_t *known;          /* for each of them: bits that were seen */
    uint64_t map_size;
    int64_t timeout;         /* ns for one input, or 0 */
    uint64_t exit_limit;     /* exits for one input */
    uint32_t count;
    uint32_t next;           /* the input to go on with */
    uint32_t running;        /* it has begun: Python served something in between */
    struct pykvm_range **stateful; /* those behind which C keeps something that an access changes */
    uint64_t stateful_hits;  /* of all of them, when the input began */
    uint32_t stateful_count;
    uint32_t hooked;         /* 1: HLT is Python's to judge; 2: a shutdown is */
    uint32_t rearm;          /* the timer has to be set anew */
    uint32_t calls;          /* so many of the reset's ioctls, the first, are made */
};

/*
 * Run inputs until all are done; or an exit that Python has to look at: an outcome as
 * pykvm_vcpu_answer() returns it, and the next call goes on with `answer`; or a reset failed, as
 * reset->failed and `error` say; or devices have to be put back before the next input.
 */
enum pykvm_fuzz_outcome { PYKVM_FUZZ_DONE = 1, PYKVM_FUZZ_FAILED = 2, PYKVM_FUZZ_DEVICES = 3 };
int64_t pykvm_fuzz_run(struct pykvm_fuzz *fuzz, uint64_t answer, int32_t *error);
/* The input that runs has ended so; Python decided it. 0, or -errno of its reset. */
int pykvm_fuzz_end(struct pykvm_fuzz *fuzz, int64_t outcome);

/* ---- disks: what Python's os module has not (disk.c) ---------------------------------------- */

/* What a block device says of itself, in bytes; see queue-sysfs in the kernel's documentation. */
struct pykvm_block_limits {
    uint64_t size;
    uint32_t logical;   /* the least that is read or written */
    uint32_t physical;  /* the least that is written without reading first */
    uint32_t min_io;    /* preferred least size, or 0 */
    uint32_t opt_io;    /* preferred size, or 0 */
    uint32_t alignment; /* where the first physical block begins */
};
int pykvm_block_limits(int fd, struct pykvm_block_limits *limits);
/* Forget a range of a block device; what is read there afterwards may be anything. */
int pykvm_block_discard(int fd, int64_t offset, int64_t length);
/* Give a range of a file or block device back to the host; it reads as zeros. */
int pykvm_file_punch(int fd, int64_t offset, int64_t length);
/* Make a range zeros and keep its space. */
int pykvm_file_zero(int fd, int64_t offset, int64_t length);

/* cdef: end */

/* Inside C only. */

#define PYKVM_SERVED INT64_MIN /* an action served it: go on */
#define PYKVM_ALL_ONES UINT64_MAX

/* Serve the access from vcpu->access.index on: PYKVM_SERVED or what to return. */
int64_t pykvm_bus_serve(struct pykvm_vcpu *vcpu);
/* Python's answer to the pending item, of which the low bytes count. */
void pykvm_bus_answer(struct pykvm_vcpu *vcpu, uint64_t answer);
/* Set the thread's timer to the deadline, or to the heartbeat if that comes first. */
void pykvm_kick_arm(struct pykvm_vcpu *vcpu);
int64_t pykvm_now(void);
/* Around every KVM_RUN of a vCPU that has `events`, and at the end of its run.  They are handed in:
   another thread may take vcpu->events away at any time. */
void pykvm_events_enter(struct pykvm_vcpu *vcpu, struct pykvm_events *events);
void pykvm_events_exit(struct pykvm_vcpu *vcpu, struct pykvm_events *events);
void pykvm_events_close(struct pykvm_vcpu *vcpu, struct pykvm_events *events);
/* Whether the exit, an I/O, may be of a planted stop. */
int pykvm_may_be_planted(const struct kvm_run *run, const struct pykvm_planted *planted);

/* Held for some tens of nanoseconds. */
static inline void pykvm_spin_lock(uint32_t *lock)
{
    for (int spins = 0; __atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE); spins++)
        if (spins > 100) /* the holder may have lost its core */
            sched_yield();
}

static inline void pykvm_spin_unlock(uint32_t *lock)
{
    __atomic_store_n(lock, 0, __ATOMIC_RELEASE);
}

#endif
