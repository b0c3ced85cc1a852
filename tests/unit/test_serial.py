"""The 16550A: as Linux's driver meets it, its interrupts, and its two ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from pykvm import result as reasons
from pykvm.devices.ring import RingFullError
from pykvm.devices.serial import Serial
from pykvm.vcpu_thread import NEVER
from tests.support.fake_vcpu import HLT, FakeRun, pio
from tests.support.serial_wire import (
    DATA,
    FCR,
    IER,
    IIR,
    LCR,
    LSR,
    MCR,
    MSR,
    SCRATCH,
    Wire,
    access,
    inb,
    out,
)
from tests.support.waiting import join, until

pytestmark = pytest.mark.sanitize

COM1 = 0x3F8


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.close()


# ---- as Linux's 8250 driver goes about it (drivers/tty/serial/8250/8250_port.c) ----------------


def test_linux_finds_a_16550a(wire: Wire) -> None:
    """autoconfig(): is there a port at all, does it loop back, and which kind is it."""
    serial = wire.serial
    out(serial, IER, 0)
    assert inb(serial, IER) & 0x0F == 0
    out(serial, IER, 0x0F)
    assert inb(serial, IER) & 0x0F == 0x0F
    out(serial, IER, 0)
    out(serial, MCR, 0x10 | 0x0A)
    assert inb(serial, MSR) & 0xF0 == 0x90
    out(serial, MCR, 0)
    out(serial, LCR, 0xBF)
    out(serial, FCR, 0)
    out(serial, LCR, 0)
    out(serial, FCR, 1)
    assert inb(serial, IIR) >> 6 == 3  # a 16550A, or better:
    for lcr in (0x80, 0xBF):
        out(serial, LCR, lcr)
        assert inb(serial, IIR) != 0  # no 16650, no 16850
    out(serial, LCR, 0)
    for lcr in (0, 0x80):
        out(serial, LCR, lcr)
        out(serial, FCR, 0x21)
        assert inb(serial, IIR) >> 5 == 6  # no 16750
    out(serial, LCR, 0)
    out(serial, IER, 0x40)
    assert inb(serial, IER) & 0x40 == 0  # no XScale


def test_linux_counts_sixteen_bytes_of_fifo(wire: Wire) -> None:
    """size_fifo(): 256 bytes go round; as many come back as the FIFO holds."""
    serial = wire.serial
    out(serial, LCR, 0)
    out(serial, FCR, 7)
    out(serial, MCR, 0x10)
    for number in range(256):
        out(serial, DATA, number)
    back = []
    while inb(serial, LSR) & 1:
        back.append(inb(serial, DATA))
    assert back == list(range(16))
    assert serial.read() == b""


def test_linux_finds_its_transmit_interrupts_in_order(wire: Wire) -> None:
    """serial8250_do_startup(): enabled twice, told twice; and UART_BUG_TXEN's test."""
    serial = wire.serial
    assert inb(serial, LSR) & 0x20
    for _ in range(2):
        out(serial, IER, 2)
        assert inb(serial, IIR) == 0x02
        out(serial, IER, 0)
    out(serial, IER, 2)
    assert inb(serial, LSR) & 0x40
    assert not inb(serial, IIR) & 1
    out(serial, IER, 0)


def test_opening_the_port_loses_no_input_under_flow_control() -> None:
    """What serial8250_do_startup() throws away was not sent yet: RTS comes after it."""
    serial = Serial(flow_control=True)
    serial.write(b"typed too early\n")
    for value in (1, 7, 0):
        out(serial, FCR, value)
    for register in (LSR, DATA, IIR, MSR) * 2:
        inb(serial, register)
    out(serial, FCR, 0x81)
    out(serial, MCR, 0x0B)
    got = b""
    while inb(serial, LSR) & 1:
        got += bytes([inb(serial, DATA)])
    assert got == b"typed too early\n"
    serial.close()


@pytest.mark.parametrize(
    ("first", "then", "kept"),
    [(0x01, 0x00, 0), (0x00, 0x01, 0), (0x01, 0xC1, 3), (0x01, 0x03, 0), (0x01, 0x05, 3)],
)
def test_the_receivers_fifo_is_cleared_when_told_and_when_it_comes_or_goes(
    wire: Wire, first: int, then: int, kept: int
) -> None:
    serial = wire.serial
    out(serial, FCR, first)
    out(serial, MCR, 0x10)
    for byte in b"abc":
        out(serial, DATA, byte)
    out(serial, FCR, then)
    count = 0
    while inb(serial, LSR) & 1:
        inb(serial, DATA)
        count += 1
    assert count == kept


@pytest.mark.parametrize(("fcr", "kept"), [(0, b"z"), (1, b"abcdefghijklmnop")])
def test_an_overrun_loses_the_old_byte_or_with_fifos_the_new_ones(
    wire: Wire, fcr: int, kept: bytes
) -> None:
    serial = wire.serial
    out(serial, FCR, fcr)
    out(serial, MCR, 0x10)
    for byte in b"abcdefghijklmnopqrstuvwxyz":
        out(serial, DATA, byte)
    assert inb(serial, LSR) & 0x03 == 0x03
    assert inb(serial, LSR) & 0x02 == 0
    assert bytes(inb(serial, DATA) for _ in kept) == kept
    assert inb(serial, LSR) & 1 == 0


# ---- interrupts --------------------------------------------------------------------------------


def test_a_handler_that_only_writes_the_next_byte_gets_an_interrupt_for_it(wire: Wire) -> None:
    out(wire.serial, IER, 2)
    assert wire.edges() == 1
    for _ in range(3):
        out(wire.serial, DATA, 0x41)  # takes the interrupt back without IIR being read
        assert wire.edges() == 1


def test_input_interrupts_once_until_it_has_been_read(wire: Wire) -> None:
    out(wire.serial, IER, 1)
    wire.serial.write(b"ab")
    wire.serial.write(b"c")
    assert wire.edges() == 1
    assert [inb(wire.serial, DATA) for _ in range(3)] == list(b"abc")
    assert inb(wire.serial, IIR) == 1
    wire.serial.write(b"d")
    assert wire.edges() == 1


def test_input_that_came_before_interrupts_were_enabled_is_told(wire: Wire) -> None:
    wire.serial.write(b"early")
    assert wire.edges() == 0
    out(wire.serial, IER, 1)
    assert wire.edges() == 1


def test_a_break_interrupts_when_its_turn_has_come(wire: Wire) -> None:
    serial = wire.serial
    out(serial, IER, 4)
    serial.write(b"a")
    serial.send_break()
    assert (wire.edges(), inb(serial, LSR)) == (0, 0x61)
    assert inb(serial, DATA) == ord("a")
    assert (wire.edges(), inb(serial, IIR)) == (1, 0x06)
    assert inb(serial, LSR) == 0x71
    assert inb(serial, IIR) == 1
    assert (inb(serial, DATA), inb(serial, LSR)) == (0, 0x60)


@pytest.mark.parametrize(("fcr", "level"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_input_below_the_trigger_level_is_told_as_timed_out(
    wire: Wire, fcr: int, level: int
) -> None:
    out(wire.serial, FCR, fcr)
    out(wire.serial, IER, 1)
    for count in range(1, 17):
        wire.serial.write(b"x")
        assert inb(wire.serial, IIR) == (0xC4 if count >= level else 0xCC)
    assert wire.edges() == 1


def test_without_an_interrupt_line_polling_works() -> None:
    serial = Serial()
    out(serial, IER, 0x0F)
    assert inb(serial, LSR) == 0x60
    serial.write(b"x")
    assert inb(serial, LSR) == 0x61
    assert inb(serial, DATA) == ord("x")
    serial.close()


# ---- the two ends, and the bus -----------------------------------------------------------------


def run(fake: FakeRun, exits: int | None = None) -> str:
    return fake.runner.run(NEVER, exits).reason


def test_output_reaches_python_only_when_the_ring_is_full() -> None:
    text = bytes(range(256)) * 2
    polled = [exit for byte in text for exit in (pio(COM1 + LSR), pio(COM1, bytes([byte])))]
    fake = FakeRun(*polled, HLT)
    batches: list[bytes] = []
    serial = Serial(capacity=64, sink=batches.append)
    serial.attach(fake.pio, COM1)
    assert run(fake) == reasons.HALTED
    fake.pio.drain()
    assert b"".join(batches) == text
    assert [len(batch) for batch in batches] == [64] * 8


def test_a_string_of_output_that_does_not_fit_is_not_cut() -> None:
    fake = FakeRun(*[pio(COM1, bytes(range(16)))] * 5, HLT)
    serial = Serial(capacity=16, sink=(got := bytearray()).extend)
    serial.attach(fake.pio, COM1)
    assert run(fake) == reasons.HALTED
    fake.pio.drain()
    assert bytes(got) == bytes(range(16)) * 5


def test_output_that_nobody_reads_is_bounded_and_nothing_of_it_is_lost() -> None:
    fake = FakeRun(pio(COM1, b"x" * 8))
    serial = Serial(capacity=16, keep=64)
    serial.attach(fake.pio, COM1)
    with pytest.raises(RingFullError, match="64 bytes that nobody read"):
        run(fake)
    assert len(serial.read()) == 64 + 16
    assert run(fake, 2) == reasons.LIMIT


def test_a_wide_access_is_several_of_one_byte() -> None:
    fake = FakeRun(
        pio(COM1 + LCR, b"\x83"), pio(COM1, b"\x01\x02", size=2), pio(COM1, size=2),
        pio(COM1 + SCRATCH, b"\x55\xff", size=2), pio(COM1 + SCRATCH, size=4), HLT,
    )  # fmt: skip
    serial = Serial()
    serial.attach(fake.pio, COM1)
    assert run(fake) == reasons.HALTED
    assert fake.answered(2, 2) == b"\1\2"
    assert fake.answered(4, 4) == b"\x55\xff\xff\xff"
    serial.close()
    assert fake.pio.find(COM1) is None
    serial.close()


def test_input_is_bounded_and_all_or_nothing() -> None:
    serial = Serial(input_capacity=16)
    serial.write(b"0123456789")
    assert (serial.pending, serial.room) == (10, 6)
    with pytest.raises(RingFullError, match=r"7 bytes.*has not read 10 of 16"):
        serial.write(b"abcdefg")
    serial.write(b"abcdef")
    assert serial.room == 0
    assert bytes(inb(serial, DATA) for _ in range(17)) == b"0123456789abcdef\0"


def test_an_eventfd_tells_that_the_input_was_used_up() -> None:
    serial = Serial()
    fd = serial.input_fileno()
    serial.write(b"ab")
    inb(serial, DATA)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fd)
    inb(serial, DATA)
    inb(serial, DATA)  # nothing there: nothing to tell
    assert os.eventfd_read(fd) == 1
    serial.close()
    with pytest.raises(OSError):
        os.fstat(fd)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="power of two"):
        Serial(input_capacity=100)
    with pytest.raises(OSError):
        Serial(irq=1 << 20)
    small, big = Serial(input_capacity=16), Serial()
    big.write(b"x" * 17)
    with pytest.raises(ValueError, match="17 bytes"):
        small.restore(big.state())


def test_input_from_another_thread_arrives_whole_and_in_order() -> None:
    serial = Serial(input_capacity=64)
    text = bytes(n * 7 & 0xFF for n in range(4000))

    over = threading.Event()

    def feed() -> None:
        at = 0
        while at < len(text) and not over.is_set():
            piece = text[at : at + serial.room]
            serial.write(piece)
            at += len(piece)

    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    got = bytearray()

    def receive() -> bool:
        if inb(serial, LSR) & 1:
            got.append(inb(serial, DATA))
        return len(got) == len(text)

    try:
        until(f"the {len(text)} bytes that were sent", receive)
    finally:
        over.set()
    join(thread)
    assert got == text


def test_output_is_drained_and_read_by_two_threads_without_a_byte_lost_or_twice() -> None:
    serial = Serial(capacity=16)
    got = bytearray()
    done = threading.Event()

    def collect() -> None:
        while not done.is_set():
            got.extend(serial.read())
        got.extend(serial.read())

    def take(byte: int) -> bool:
        taken = access(serial, DATA, bytes([byte])) is not None
        if not taken:
            serial.drain()
        return taken

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    text = bytes(n & 0xFF for n in range(4000))
    try:
        for byte in text:
            until(f"room for byte {byte:#x}", partial(take, byte))
    finally:
        done.set()
    join(thread)
    assert got == text
