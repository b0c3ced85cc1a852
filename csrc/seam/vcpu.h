/* seam/vcpu.h - a vCPU, its runs, and who watches them. */
#ifndef PYKVM_SEAM_VCPU_H
#define PYKVM_SEAM_VCPU_H

#include "bus.h"
#include "pykvm_kvm.h"

/* cdef: begin */

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
    struct pykvm_log *log;         /* record or replay what the guest is given, or NULL */
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
    PYKVM_LOGGED = -12,     /* the log has something for Python; call again to go on */
    PYKVM_REPLAYED = -13,   /* the log is at its end */
    PYKVM_DIVERGED = -14,   /* the exit is not the one in the log */
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

/* cdef: end */

#endif
