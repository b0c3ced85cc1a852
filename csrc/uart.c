/*
 * uart.c - a 16550A UART, all of it: Linux's 8250 driver and its interrupts never reach Python.
 *
 * After the data sheet of the PC16550D (National Semiconductor, June 1995; its tables are named
 * below).  The line is infinitely fast: what is written has left at once, so the transmitter is
 * always empty, and input is received at the moment the guest looks for it.  So the receiver never
 * overruns and its FIFO has no need to hold host input; it holds what loopback sends.
 */
#include "pykvm.h"

#include <errno.h>
#include <unistd.h>

enum { /* registers; those of the divisor latch while LCR has DLAB set */
    DATA = 0,
    DIVISOR_LOW = 0,
    IER = 1,
    DIVISOR_HIGH = 1,
    IIR_FCR = 2, /* read: interrupt identification; write: FIFO control */
    LCR = 3,
    MCR = 4,
    LSR = 5,
    MSR = 6,
    SCRATCH = 7,
    REGISTERS = 8,
};

enum { /* table II, Summary of Registers */
    IER_RECEIVED = 1 << 0,
    IER_EMPTY = 1 << 1,
    IER_LINE = 1 << 2,
    IER_MODEM = 1 << 3,
    IER_ALL = 0xf,

    IIR_NONE = 0x1,
    IIR_MODEM = 0x0,
    IIR_EMPTY = 0x2,
    IIR_RECEIVED = 0x4,
    IIR_TIMEOUT = 0xc,
    IIR_LINE = 0x6,
    IIR_FIFOS = 0xc0,

    FCR_ENABLE = 1 << 0,
    FCR_CLEAR_RECEIVER = 1 << 1,
    FCR_KEPT = 0xc9, /* enable, DMA mode, trigger level; the others act once */
    FCR_TRIGGER_SHIFT = 6,

    LCR_DLAB = 1 << 7,

    MCR_DTR = 1 << 0,
    MCR_RTS = 1 << 1,
    MCR_OUT1 = 1 << 2,
    MCR_OUT2 = 1 << 3,
    MCR_LOOP = 1 << 4,
    MCR_ALL = 0x1f,

    LSR_READY = 1 << 0,
    LSR_OVERRUN = 1 << 1,
    LSR_IN_CHARACTER = 0x1c, /* parity, framing, break: they come with a character */
    LSR_EMPTY = 0x60,        /* holding register and transmitter */
    LSR_ERROR_IN_FIFO = 1 << 7,

    MSR_CTS = 1 << 4,
    MSR_DSR = 1 << 5,
    MSR_RI = 1 << 6,
    MSR_DCD = 1 << 7,
    MSR_DELTAS = 0xf,
    MSR_RI_ENDED = 1 << 2,
};

/* ---- the receiver ---------------------------------------------------------------------------- */

static int connected(const struct pykvm_uart *uart)
{
    if (uart->mcr & MCR_LOOP)
        return 0;
    return !uart->flow_control || uart->mcr & MCR_RTS;
}

static uint32_t waiting(const struct pykvm_uart *uart)
{
    return uart->fifo_count + (connected(uart) ? (uint32_t)(uart->head - uart->tail) : 0);
}

static uint8_t receive(struct pykvm_uart *uart)
{
    if (uart->fifo_count) {
        uint8_t byte = uart->fifo[uart->fifo_first];
        uart->fifo_first = (uart->fifo_first + 1) % sizeof uart->fifo;
        uart->fifo_count--;
        return byte;
    }
    if (!waiting(uart))
        return 0;
    return (uint8_t)uart->input[uart->tail++ & (uart->capacity - 1)];
}

/* Loopback: the transmitter feeds the receiver, which can overrun. */
static void loop_back(struct pykvm_uart *uart, uint8_t byte)
{
    uint8_t room = uart->fcr & FCR_ENABLE ? sizeof uart->fifo : 1;
    if (uart->fifo_count >= room) {
        uart->errors |= LSR_OVERRUN;
        if (uart->fcr & FCR_ENABLE) /* a FIFO loses the new one, a single register the old one */
            return;
        uart->fifo_count = 0;
    }
    uart->fifo[(uart->fifo_first + uart->fifo_count++) % sizeof uart->fifo] = byte;
}

/* ---- interrupts ------------------------------------------------------------------------------ */

/* Table IV, Interrupt Control Functions: the source of the highest priority. */
static uint8_t source(const struct pykvm_uart *uart)
{
    static const uint8_t levels[] = {1, 4, 8, 14};
    if (uart->ier & IER_LINE && uart->errors)
        return IIR_LINE;
    if (uart->ier & IER_RECEIVED && waiting(uart)) {
        /* What is below the trigger level has timed out already, on a line this fast.  Without
           FIFOs the level is 1. */
        uint8_t level = levels[uart->fcr >> FCR_TRIGGER_SHIFT];
        return waiting(uart) < level ? IIR_TIMEOUT : IIR_RECEIVED;
    }
    if (uart->ier & IER_EMPTY && uart->emptied)
        return IIR_EMPTY;
    if (uart->ier & IER_MODEM && uart->deltas)
        return IIR_MODEM;
    return IIR_NONE;
}

static void notify(int fd)
{
    uint64_t one = 1;
    if (fd >= 0) {
        ssize_t ignored = write(fd, &one, sizeof one); /* EAGAIN: it has not been seen yet */
        (void)ignored;
    }
}

/* Bring line status and interrupt line up to date, and note if the latter rose. */
static void update(struct pykvm_uart *uart)
{
    if (!uart->fifo_count && waiting(uart)) { /* errors show when their character is the next */
        uint16_t *next = &uart->input[uart->tail & (uart->capacity - 1)];
        uart->errors |= *next >> 8;
        *next &= 0xff;
    }
    uint8_t was = uart->line;
    uart->line = source(uart) != IIR_NONE;
    uart->rose |= uart->line && !was;
}

/* Let go of the UART, then tell the world: whether its last input was read, and of an interrupt. */
static void release(struct pykvm_uart *uart, int consumed)
{
    int rose = uart->rose;
    uart->rose = 0;
    pykvm_spin_unlock(&uart->lock);
    if (rose)
        notify(uart->irq);
    if (consumed)
        notify(uart->consumed);
}

/* ---- registers ------------------------------------------------------------------------------- */

static uint8_t modem_lines(const struct pykvm_uart *uart)
{
    if (!(uart->mcr & MCR_LOOP))
        return MSR_CTS | MSR_DSR | MSR_DCD; /* somebody is there, and listens */
    return (uint8_t)((uart->mcr & MCR_RTS ? MSR_CTS : 0) | (uart->mcr & MCR_DTR ? MSR_DSR : 0) |
                     (uart->mcr & MCR_OUT1 ? MSR_RI : 0) | (uart->mcr & MCR_OUT2 ? MSR_DCD : 0));
}

static void set_modem_control(struct pykvm_uart *uart, uint8_t value)
{
    uint8_t before = modem_lines(uart);
    uart->mcr = value & MCR_ALL;
    uint8_t after = modem_lines(uart), changed = (uint8_t)((before ^ after) >> 4);
    if (after & MSR_RI)
        changed &= (uint8_t)~MSR_RI_ENDED;
    uart->deltas |= changed;
}

static void set_fifo_control(struct pykvm_uart *uart, uint8_t value)
{
    if (!(value & FCR_ENABLE)) /* without it the other bits are not programmed */
        value = 0;
    if ((value ^ uart->fcr) & FCR_ENABLE || value & FCR_CLEAR_RECEIVER)
        uart->fifo_count = 0;
    uart->fcr = value & FCR_KEPT;
}

static uint8_t read_register(struct pykvm_uart *uart, uint64_t offset)
{
    int dlab = uart->lcr & LCR_DLAB;
    uint8_t value;
    switch (offset) {
    case DATA:
        return dlab ? uart->divisor_low : receive(uart);
    case IER:
        return dlab ? uart->divisor_high : uart->ier;
    case IIR_FCR:
        value = source(uart);
        if (value == IIR_EMPTY)
            uart->emptied = 0;
        return value | (uart->fcr & FCR_ENABLE ? IIR_FIFOS : 0);
    case LCR:
        return uart->lcr;
    case MCR:
        return uart->mcr;
    case LSR:
        value = LSR_EMPTY | uart->errors;
        if (waiting(uart))
            value |= LSR_READY;
        if (uart->fcr & FCR_ENABLE && uart->errors & LSR_IN_CHARACTER)
            value |= LSR_ERROR_IN_FIFO;
        uart->errors = 0;
        return value;
    case MSR:
        value = modem_lines(uart) | uart->deltas;
        uart->deltas = 0;
        return value;
    case SCRATCH:
        return uart->scratch;
    default:
        return 0xff;
    }
}

/* 0, or -ENOSPC: nothing has changed, there is no room for output. */
static int write_register(struct pykvm_uart *uart, uint64_t offset, uint8_t value)
{
    switch (offset) {
    case DATA:
        if (uart->lcr & LCR_DLAB) {
            uart->divisor_low = value;
            return 0;
        }
        if (uart->mcr & MCR_LOOP)
            loop_back(uart, value);
        else if (pykvm_ring_push(uart->out, &value, 1))
            return -ENOSPC;
        uart->emptied = 0; /* a write takes the interrupt back, and then comes a new one */
        update(uart);
        uart->emptied = 1;
        return 0;
    case IER:
        if (uart->lcr & LCR_DLAB) {
            uart->divisor_high = value;
            return 0;
        }
        if (value & ~uart->ier & IER_EMPTY)
            uart->emptied = 1;
        uart->ier = value & IER_ALL;
        return 0;
    case IIR_FCR:
        set_fifo_control(uart, value);
        return 0;
    case LCR:
        uart->lcr = value;
        return 0;
    case MCR:
        set_modem_control(uart, value);
        return 0;
    case SCRATCH:
        uart->scratch = value;
        return 0;
    default: /* LSR and MSR are for reading */
        return 0;
    }
}

/* ---- from outside ---------------------------------------------------------------------------- */

int pykvm_uart_access(struct pykvm_uart *uart, uint64_t offset, uint8_t *data, uint8_t size,
                      int is_write)
{
    pykvm_spin_lock(&uart->lock);
    uint64_t unread = uart->head - uart->tail;
    int error = 0;
    /* A wider access makes several cycles on an 8-bit bus.  DATA can only be the first. */
    for (uint8_t i = 0; i < size && !error; i++) {
        if (is_write)
            error = write_register(uart, offset + i, data[i]);
        else
            data[i] = read_register(uart, offset + i);
    }
    update(uart);
    release(uart, unread && uart->head == uart->tail);
    return error;
}

int pykvm_uart_input(struct pykvm_uart *uart, const uint8_t *bytes, uint32_t count, uint8_t errors)
{
    pykvm_spin_lock(&uart->lock);
    int fits = count <= uart->capacity - (uart->head - uart->tail);
    for (uint32_t i = 0; fits && i < count; i++)
        uart->input[uart->head++ & (uart->capacity - 1)] = (uint16_t)(errors << 8 | bytes[i]);
    update(uart);
    release(uart, 0);
    return fits ? 0 : -ENOSPC;
}
