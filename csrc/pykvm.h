/*
 * pykvm.h - the whole seam between C and Python, in parts by subject: seam/.  cffi reads them in
 * this order, each from its "cdef: begin" to its "cdef: end".
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

#include "seam/host.h"
#include "seam/bus.h"
#include "seam/devices.h"
#include "seam/virtio.h"
#include "seam/vcpu.h"
#include "seam/reset.h"
#include "seam/replay.h"

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
/* Have KVM complete the last exit's instruction, and no more: -EINTR if it did. */
int pykvm_complete(struct pykvm_vcpu *vcpu);
/* Around every KVM_RUN of a vCPU that has `events`, and at the end of its run.  They are handed in:
   another thread may take vcpu->events away at any time. */
void pykvm_events_enter(struct pykvm_vcpu *vcpu, struct pykvm_events *events);
void pykvm_events_exit(struct pykvm_vcpu *vcpu, struct pykvm_events *events);
void pykvm_events_close(struct pykvm_vcpu *vcpu, struct pykvm_events *events);
/* Around every KVM_RUN of a vCPU that has a `log`.  Before it: PYKVM_SERVED, or what to return. */
int64_t pykvm_log_enter(struct pykvm_vcpu *vcpu, struct pykvm_log *log);
void pykvm_log_exit(struct pykvm_vcpu *vcpu, struct pykvm_log *log);
/* It returned without an exit; `at_once`: immediate_exit was set when it was called. */
void pykvm_log_interrupted(struct pykvm_log *log, int at_once);
/* Answer an exit from the log: PYKVM_SERVED, or PYKVM_DIVERGED. */
int64_t pykvm_log_replay(struct pykvm_vcpu *vcpu, struct pykvm_log *log);
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
