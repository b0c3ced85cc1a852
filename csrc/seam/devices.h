/* seam/devices.h - devices whose registers C serves. */
#ifndef PYKVM_SEAM_DEVICES_H
#define PYKVM_SEAM_DEVICES_H

#include "bus.h"

/* cdef: begin */

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

/* cdef: end */

#endif
