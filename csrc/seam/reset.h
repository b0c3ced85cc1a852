/* seam/reset.h - snapshots put back, and input after input run from one. */
#ifndef PYKVM_SEAM_RESET_H
#define PYKVM_SEAM_RESET_H

#include "vcpu.h"

/* cdef: begin */

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
    struct kvm_nested_state *nested; /* without L2: for a vCPU that has SVM or VMX on by now; or NULL */
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
    uint32_t failed;    /* index of the call that failed, or enum pykvm_reset_failed */
    int64_t result;     /* what it returned */
    uint8_t **plants;   /* places in memory, in order, that hold `plant` whatever the images say:
                           stops.  They are planted on pages that are put back; others have them */
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

enum pykvm_reset_failed {
    PYKVM_RESET_FAILED_LOG = 0x7ffffffe,    /* KVM_GET_DIRTY_LOG */
    PYKVM_RESET_FAILED_NESTED = 0x7fffffff, /* KVM_SET_NESTED_STATE */
};

enum { PYKVM_RESET_COMPARE = 8 }; /* every so many resets pages are compared instead of copied */

/* Put everything back: 0; -EAGAIN: an access of a vCPU is open, and Python must see to it; -errno,
   and `failed` says of which call. */
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

/* ---- fuzzing: input after input, without Python (fuzz.c) ------------------------------------- */

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
    uint32_t hooked;         /* 1: HLT is Python's to judge; 2: a shutdown is; 4: every end is */
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

/* cdef: end */

#endif
