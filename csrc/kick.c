/*
 * kick.c - getting a vCPU out of the guest: a signal, and kvm_run.immediate_exit.
 *
 * A signal alone could arrive just before KVM_RUN and be lost.  Its handler therefore sets
 * immediate_exit of the vCPU that this thread runs, and KVM_RUN returns EINTR at once
 * (api.rst, "4.10 KVM_RUN" and struct kvm_run).
 *
 * The deadline is a timer of the thread that signals the thread itself; it also beats every
 * PYKVM_HEARTBEAT_MS, so that a signal for Python (Ctrl-C) that arrived in that gap is seen.
 */
#define _GNU_SOURCE
#include "pykvm.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

static __thread struct pykvm_vcpu *current; /* the vCPU this thread runs */
static __thread timer_t timer;
static __thread int has_timer;
static __thread int32_t own_tid; /* valid with has_timer */
static pthread_key_t timer_key;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int setup_error;

int pykvm_kick_signal(void)
{
    return SIGRTMIN + 5;
}

static void set_immediate_exit(struct pykvm_vcpu *vcpu, uint8_t value)
{
    __atomic_store_n(&vcpu->run->immediate_exit, value, __ATOMIC_SEQ_CST);
}

static void on_signal(int signal)
{
    (void)signal;
    struct pykvm_vcpu *vcpu = current;
    if (vcpu)
        set_immediate_exit(vcpu, 1);
}

/* A forked child has none of its parent's timers, and none of its vCPUs runs there. */
static void in_child(void)
{
    has_timer = 0;
    current = NULL;
}

static void drop_timer(void *unused)
{
    (void)unused;
    if (has_timer)
        timer_delete(timer);
    has_timer = 0;
}

static void setup(void)
{
    struct sigaction old, action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigemptyset(&action.sa_mask);
    if (sigaction(pykvm_kick_signal(), NULL, &old) == 0 && !(old.sa_flags & SA_SIGINFO) &&
        (old.sa_handler == SIG_DFL || old.sa_handler == SIG_IGN)) {
        if (sigaction(pykvm_kick_signal(), &action, NULL) < 0)
            setup_error = errno;
        else if (!(setup_error = pthread_atfork(NULL, NULL, in_child)))
            setup_error = pthread_key_create(&timer_key, drop_timer);
    } else {
        setup_error = EEXIST;
    }
}

/* A thread's first run: the signal unblocked, a timer of its own. */
static int prepare_thread(void)
{
    sigset_t set;
    struct sigevent event = {
        .sigev_notify = SIGEV_THREAD_ID,
        .sigev_signo = pykvm_kick_signal(),
    };
    own_tid = (int32_t)syscall(SYS_gettid);
    event.sigev_notify_thread_id = own_tid;
    sigemptyset(&set);
    sigaddset(&set, pykvm_kick_signal());
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    if (timer_create(CLOCK_MONOTONIC, &event, &timer) < 0)
        return -errno;
    has_timer = 1;
    pthread_setspecific(timer_key, &timer_key); /* any non-NULL value: drop_timer at thread's end */
    return 0;
}

int64_t pykvm_now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static void set_timer(int64_t at)
{
    struct itimerspec when = {.it_value = {at / 1000000000, at % 1000000000}};
    if (has_timer)
        timer_settime(timer, TIMER_ABSTIME, &when, NULL);
}

void pykvm_kick_arm(struct pykvm_vcpu *vcpu)
{
    int64_t beat = pykvm_now() + PYKVM_HEARTBEAT_MS * INT64_C(1000000);
    int64_t at = vcpu->deadline < beat ? vcpu->deadline : beat;
    set_timer(at > 0 ? at : 1); /* 0 would disarm it */
}

int pykvm_vcpu_begin(struct pykvm_vcpu *vcpu, int64_t deadline)
{
    int32_t nobody = 0;
    pthread_once(&once, setup);
    if (setup_error)
        return -setup_error;
    if (!has_timer) {
        int error = prepare_thread();
        if (error)
            return error;
    }
    if (!__atomic_compare_exchange_n(&vcpu->tid, &nobody, own_tid, 0, __ATOMIC_SEQ_CST,
                                     __ATOMIC_SEQ_CST))
        return -EBUSY;
    vcpu->deadline = deadline;
    vcpu->outer = current;
    current = vcpu;
    /* Of several vCPUs one had halted when another ended the run; it was given a new state. */
    if (vcpu->access.pending == PYKVM_UNSERVED && vcpu->run->exit_reason == KVM_EXIT_HLT &&
        vcpu->run->kvm_dirty_regs)
        vcpu->access.pending = PYKVM_IDLE;
    if (__atomic_load_n(&vcpu->stop, __ATOMIC_SEQ_CST)) /* asked before the run began */
        set_immediate_exit(vcpu, 1);
    pykvm_kick_arm(vcpu);
    return 0;
}

void pykvm_vcpu_end(struct pykvm_vcpu *vcpu)
{
    struct pykvm_vcpu *outer = vcpu->outer;
    if (current != vcpu)
        return;
    current = outer;
    vcpu->outer = NULL;
    struct pykvm_events *events = __atomic_load_n(&vcpu->events, __ATOMIC_ACQUIRE);
    if (events)
        pykvm_events_close(vcpu, events);
    set_immediate_exit(vcpu, 0);
    __atomic_store_n(&vcpu->tid, 0, __ATOMIC_SEQ_CST); /* from here on another thread may begin */
    if (current) {
        set_immediate_exit(current, 1); /* its beat may have been lost on us: look again */
        pykvm_kick_arm(current);
    } else {
        set_timer(0);
    }
}

void pykvm_vcpu_nudge(struct pykvm_vcpu *vcpu)
{
    int32_t tid = __atomic_load_n(&vcpu->tid, __ATOMIC_SEQ_CST);
    if (tid && current != vcpu)
        syscall(SYS_tgkill, getpid(), tid, pykvm_kick_signal());
}

void pykvm_vcpu_stop(struct pykvm_vcpu *vcpu)
{
    int own = current == vcpu;
    __atomic_store_n(&vcpu->stop, own ? PYKVM_STOP_OWN : PYKVM_STOP_OTHER, __ATOMIC_SEQ_CST);
    set_immediate_exit(vcpu, 1);
    int32_t tid = __atomic_load_n(&vcpu->tid, __ATOMIC_SEQ_CST);
    /* A handler that stops its own run is not in the guest.  Another thread's may be gone by now:
       ESRCH, and the next run finds `stop` set. */
    if (tid && !own)
        syscall(SYS_tgkill, getpid(), tid, pykvm_kick_signal());
}

int pykvm_complete(struct pykvm_vcpu *vcpu)
{
    uint8_t *flag = &vcpu->run->immediate_exit;
    /* A signal may set 1 meanwhile, for the next run to see: only what is ours is taken back. */
    uint8_t nobody = 0, ours = 2;
    __atomic_compare_exchange_n(flag, &nobody, ours, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    int error = vcpu->enter(vcpu);
    __atomic_compare_exchange_n(flag, &ours, 0, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    vcpu->entries++;
    return error;
}
