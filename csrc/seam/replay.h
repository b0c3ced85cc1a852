/* seam/replay.h - what a guest was given from outside, written down and given again. */
#ifndef PYKVM_SEAM_REPLAY_H
#define PYKVM_SEAM_REPLAY_H

#include "vcpu.h"

/* cdef: begin */

/* ---- the input log: see pykvm/debug/input_log.py ---------------------------------------------- */

enum pykvm_log_kind {
    PYKVM_LOG_EXIT = 1,      /* an exit: what the guest said, and what it was answered */
    PYKVM_LOG_REGISTERS = 2, /* registers that the host changed: `address` says which (KVM_SYNC_X86_*),
                                `said` are all of struct kvm_sync_regs */
    PYKVM_LOG_PAGE = 3,      /* from here on run->request_interrupt_window is bit 0 of `address`, and
                                run->cr8 is bits 8 to 11 */
    PYKVM_LOG_MEMORY = 4,    /* the host wrote `said` to the guest-physical `address`: Python's */
    PYKVM_LOG_COMPLETE = 6,  /* the exit's instruction was completed and the guest not run: what the host
                                did comes after that */
    PYKVM_LOG_IOCTL = 5,     /* the host made the ioctl `address` with the argument `said`: Python's */
};

/* Followed by `said` bytes, then `answered` bytes, each padded to a multiple of 8. */
struct pykvm_log_record {
    uint16_t kind;    /* enum pykvm_log_kind */
    uint16_t reason;  /* of an exit: KVM_EXIT_* */
    uint16_t count;   /* items of a string instruction, else 1 */
    uint8_t size;     /* bytes of an item, or 0 */
    uint8_t is_write;
    uint32_t said;
    uint32_t answered;
    uint64_t address; /* of an exit: port, gpa, MSR, or number of a hypercall */
    uint64_t number;  /* of an exit: the how manieth, from 1 on */
};

/* How far the guest has come since its last exit: what the host may do. */
enum pykvm_log_state {
    PYKVM_LOG_AT_EXIT,   /* it was not entered */
    PYKVM_LOG_COMPLETED, /* entered with immediate_exit: that is to be written down first */
    PYKVM_LOG_MARKED,    /* and it was */
    PYKVM_LOG_RAN,       /* somewhere: nothing that the host does now can be replayed */
};

enum pykvm_log_mode { PYKVM_LOG_RECORD = 1, PYKVM_LOG_REPLAY = 2 };

enum { PYKVM_LOG_ROOM = 16384 }; /* more than what one exit may add */

/* Of one vCPU, whose thread uses it; Python while that stands still. */
struct pykvm_log {
    uint8_t *bytes;    /* records, one after the other */
    uint64_t capacity;
    uint64_t end;      /* bytes used */
    uint64_t at;       /* replaying: the next record */
    uint64_t open;     /* recording: 1 + where the record of an exit is whose answer is to come, or 0;
                          replaying: of the exit that was answered last */
    uint64_t exits;    /* recorded or replayed so far */
    uint32_t mode;     /* enum pykvm_log_mode */
    uint32_t waiting;  /* recording: Python has something to write down before the next entry */
    uint32_t page;     /* recording: the `address` of PYKVM_LOG_PAGE as KVM left it */
    uint32_t state;    /* recording: enum pykvm_log_state */
    uint32_t broken;   /* recording: registers were changed in PYKVM_LOG_RAN */
    uint32_t reserved;
};

/* The exit in the run page as a record, and what the guest said (`said` has room for a page). */
void pykvm_log_found(struct pykvm_vcpu *vcpu, struct pykvm_log_record *record, uint8_t *said);

/* cdef: end */

#endif
