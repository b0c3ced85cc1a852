/*
 * watch.c - sees every access to memory that vring.c makes.
 *
 * vring.c is compiled with -fsanitize=thread, which has the compiler announce each access by a call
 * of __tsan_*; linked with this file instead of the sanitizer's library, these calls come here.  So
 * a search sees more than results: what was read twice, what is neither guest memory nor the
 * queue's own, and work without end.  It can also be the guest's other processor: a store into
 * guest memory right after a byte of choice was read, or something was written.
 */
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "pykvm.h"

enum { REGIONS = 16, KNOWN = 16, READS = 4096, WORK = 200000 };

struct span {
    uint64_t host;
    uint64_t size;
    uint64_t gpa; /* of a region */
};

/* Filled by Python before, and by the calls below. */
struct watch {
    struct span regions[REGIONS]; /* guest memory */
    struct span known[KNOWN];     /* what is the queue's own */
    uint32_t region_count;
    uint32_t known_count;
    /* The other processor. */
    uint32_t armed;      /* 1: after a read of `trigger`; 2: after any write to guest memory */
    uint32_t poke_bytes;
    uint64_t trigger;    /* gpa of a byte */
    uint64_t poke_host;
    uint8_t poke[8];
    uint32_t due;
    /* What was seen. */
    uint32_t accesses;
    uint32_t reads;
    uint32_t strays;    /* accesses to nothing that is known ... */
    uint32_t runaway;   /* it would not end */
    uint64_t stray;     /* ... and the first of them */
    struct { uint64_t gpa, size; } read[READS];
};

struct watch watch;
static __thread int watching;
static jmp_buf away;

/* Of this shared object: constants, and the counters of branches. */
extern char __ehdr_start __attribute__((visibility("hidden")));
extern char _end __attribute__((visibility("hidden")));

static const struct span *find(const struct span *spans, uint32_t count, uint64_t at, uint64_t size)
{
    for (uint32_t i = 0; i < count; i++)
        if (spans[i].host <= at && at + size <= spans[i].host + spans[i].size)
            return &spans[i];
    return NULL;
}

static void poke_if_due(void)
{
    if (watch.due) {
        watch.due = 0;
        memcpy((void *)watch.poke_host, watch.poke, watch.poke_bytes);
    }
}

static void see(void *pointer, uint64_t size, int write)
{
    if (!watching)
        return;
    uint64_t at = (uint64_t)pointer, here = (uint64_t)&at;
    if (++watch.accesses > WORK) {
        watch.runaway = 1;
        watching = 0;
        longjmp(away, 1);
    }
    const struct span *region = find(watch.regions, watch.region_count, at, size);
    if (!region) {
        int own = find(watch.known, watch.known_count, at, size) ||
                  (at >= (uint64_t)&__ehdr_start && at + size <= (uint64_t)&_end) ||
                  (at + 65536 > here && at < here + 65536); /* the stack */
        if (!own && !watch.strays++)
            watch.stray = at;
        return;
    }
    poke_if_due(); /* what was due after the last one */
    uint64_t gpa = region->gpa + (at - region->host);
    if (write) {
        if (watch.armed == 2) {
            watch.armed = 0;
            watch.due = 1;
        }
        return;
    }
    if (watch.reads < READS) {
        watch.read[watch.reads].gpa = gpa;
        watch.read[watch.reads++].size = size;
    }
    if (watch.armed == 1 && gpa <= watch.trigger && watch.trigger < gpa + size) {
        watch.armed = 0;
        watch.due = 1;
    }
}

static void begin(void)
{
    watch.accesses = watch.reads = watch.strays = watch.runaway = watch.due = 0;
    watching = 1;
}

static void end(void)
{
    watching = 0;
    poke_if_due();
    watch.armed = 0;
}

/* ---- the functions of vring.c, watched -------------------------------------------------------- */

#define WATCHED(call)                                                                             \
    volatile int result = 0;                                                                      \
    begin();                                                                                      \
    if (!setjmp(away))                                                                            \
        result = call;                                                                            \
    end();                                                                                        \
    return result

int watched_enable(struct pykvm_vring *ring) { WATCHED(pykvm_vring_enable(ring)); }
int watched_pop(struct pykvm_vring *ring, struct pykvm_chain *chain)
{
    WATCHED(pykvm_vring_pop(ring, chain));
}
int watched_push(struct pykvm_vring *ring, uint32_t generation, uint32_t head, uint32_t written)
{
    WATCHED(pykvm_vring_push(ring, generation, head, written));
}
int watched_should_interrupt(struct pykvm_vring *ring)
{
    WATCHED(pykvm_vring_should_interrupt(ring));
}
int watched_waiting(struct pykvm_vring *ring) { WATCHED(pykvm_vring_waiting(ring)); }
void watched_disable(struct pykvm_vring *ring) { pykvm_vring_disable(ring); }

/* ---- what the compiler calls ------------------------------------------------------------------- */

#define PLAIN(bytes)                                                                              \
    void __tsan_read##bytes(void *at) { see(at, bytes, 0); }                                      \
    void __tsan_write##bytes(void *at) { see(at, bytes, 1); }                                     \
    void __tsan_unaligned_read##bytes(void *at) { see(at, bytes, 0); }                            \
    void __tsan_unaligned_write##bytes(void *at) { see(at, bytes, 1); }
PLAIN(1)
PLAIN(2)
PLAIN(4)
PLAIN(8)
PLAIN(16)

#define ATOMIC(bits)                                                                              \
    uint##bits##_t __tsan_atomic##bits##_load(const volatile void *at, int order)                 \
    {                                                                                             \
        (void)order;                                                                              \
        see((void *)at, bits / 8, 0);                                                             \
        return __atomic_load_n((const volatile uint##bits##_t *)at, __ATOMIC_SEQ_CST);            \
    }                                                                                             \
    void __tsan_atomic##bits##_store(volatile void *at, uint##bits##_t value, int order)          \
    {                                                                                             \
        (void)order;                                                                              \
        see((void *)at, bits / 8, 1);                                                             \
        __atomic_store_n((volatile uint##bits##_t *)at, value, __ATOMIC_SEQ_CST);                 \
    }                                                                                             \
    uint##bits##_t __tsan_atomic##bits##_exchange(volatile void *at, uint##bits##_t value,        \
                                                  int order)                                      \
    {                                                                                             \
        (void)order;                                                                              \
        see((void *)at, bits / 8, 1);                                                             \
        return __atomic_exchange_n((volatile uint##bits##_t *)at, value, __ATOMIC_SEQ_CST);       \
    }
ATOMIC(8)
ATOMIC(16)
ATOMIC(32)
ATOMIC(64)

void __tsan_read_range(void *at, unsigned long size) { see(at, size, 0); }
void __tsan_write_range(void *at, unsigned long size) { see(at, size, 1); }
void __tsan_atomic_thread_fence(int order) { (void)order; }
void __tsan_func_entry(void *from) { (void)from; }
void __tsan_func_exit(void) {}
void __tsan_init(void) {}

/* ---- branch coverage ---------------------------------------------------------------------------- */

#ifdef COVERAGE
void __gcov_dump(void);
void __gcov_reset(void);
void coverage_dump(void) { __gcov_dump(); }
#endif

/* As reset.c has it, which is not built here; only a memory whose pages are noted calls it. */
void pykvm_pages_mark(uint64_t *bitmap, uint64_t first, uint64_t count)
{
    for (uint64_t page = first; page < first + count; page++)
        __atomic_fetch_or(&bitmap[page / 64], UINT64_C(1) << page % 64, __ATOMIC_RELAXED);
}
