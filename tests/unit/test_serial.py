"""The 16550A: register by register against a plain model, and as Linux's driver meets it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pykvm import result as reasons
from pykvm._abi import ffi, lib
from pykvm.devices.ring import RingFullError
from pykvm.devices.serial import Serial
from pykvm.vcpu_thread import NEVER
from tests.support.fake_vcpu import HLT, FakeRun, pio
from tests.support.waiting import join, until

pytestmark = pytest.mark.sanitize

COM1 = 0x3F8
DATA, IER, IIR, LCR, MCR, LSR, MSR, SCRATCH = range(8)
FCR = IIR


def access(serial: Serial, offset: int, data: bytes | int) -> bytes | None:
    """One access as a guest makes it: a write of bytes, or a read of so many. None: no room."""
    write = isinstance(data, bytes)
    buffer = bytearray(data)
    pointer = ffi.from_buffer("uint8_t[]", buffer)
    if lib.pykvm_uart_access(serial.c, offset, pointer, len(buffer), write):
        return None
    return bytes(buffer)


def out(serial: Serial, offset: int, value: int) -> None:
    assert access(serial, offset, bytes([value])) is not None


def inb(serial: Serial, offset: int) -> int:
    data = access(serial, offset, 1)
    assert data is not None
    return data[0]


class Wire:
    """A serial port with an eventfd for its interrupt, whose edges can be counted."""

    def __init__(self, **options: Any) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.serial = Serial(irq=self.fd, **options)

    def edges(self) -> int:
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        self.serial.close()
        os.close(self.fd)


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.close()


# ---- against a model ---------------------------------------------------------------------------


class Model:
    """What the data sheet says, in the plainest form: lists, and a set of reasons to interrupt."""

    def __init__(self, room: int, flow_control: bool) -> None:
        self.room = room
        self.flow_control = flow_control
        self.sent = b""  # since it was last taken away
        self.looped: list[int] = []
        self.line: list[tuple[int, int]] = []  # (byte, LSR bits), not yet received
        self.ier = self.lcr = self.mcr = self.scratch = self.divisor_high = self.trigger = 0
        self.divisor_low = 12
        self.fifos = False
        self.errors = self.deltas = 0
        self.thr_interrupt = False
        self.interrupting = False
        self.edges = 0

    def received(self) -> list[int]:
        there = list(self.looped)
        if not self.mcr & 0x10 and (not self.flow_control or self.mcr & 2):
            there += [byte for byte, _ in self.line]
        return there

    def reasons(self) -> list[int]:
        """Interrupt identifications, the most urgent first."""
        count = len(self.received())
        late = self.fifos and count < (1, 4, 8, 14)[self.trigger]
        every = [
            (0x06, self.ier & 4 and self.errors),
            (0x0C if late else 0x04, self.ier & 1 and count),
            (0x02, self.ier & 2 and self.thr_interrupt),
            (0x00, self.ier & 8 and self.deltas),
        ]
        return [number for number, pending in every if pending]

    def settle(self) -> None:
        if self.received() and not self.looped:
            byte, errors = self.line[0]
            self.errors |= errors
            self.line[0] = (byte, 0)
        pending = bool(self.reasons())
        self.edges += pending and not self.interrupting
        self.interrupting = pending

    def modem(self) -> int:
        if not self.mcr & 0x10:
            return 0xB0
        pairs = ((2, 0x10), (1, 0x20), (4, 0x40), (8, 0x80))
        return sum(there for control, there in pairs if self.mcr & control)

    def read(self, offset: int) -> int:
        if offset == DATA and not self.lcr & 0x80:
            there = self.received()
            if there:
                (self.looped or self.line).pop(0)
            value = there[0] if there else 0
        elif offset == DATA:
            value = self.divisor_low
        elif offset == IER:
            value = self.divisor_high if self.lcr & 0x80 else self.ier
        elif offset == IIR:
            value = (self.reasons() or [1])[0]
            if value == 0x02:
                self.thr_interrupt = False
            value |= 0xC0 if self.fifos else 0
        elif offset == LSR:
            in_fifo = self.fifos and self.errors & 0x1C
            value = 0x60 | bool(self.received()) | self.errors | (0x80 if in_fifo else 0)
            self.errors = 0
        elif offset == MSR:
            value = self.modem() | self.deltas
            self.deltas = 0
        else:
            value = {LCR: self.lcr, MCR: self.mcr, SCRATCH: self.scratch}[offset]
        self.settle()
        return value

    def write(self, offset: int, value: int) -> bool:
        """Whether there was room."""
        if offset == DATA and not self.lcr & 0x80:
            if self.mcr & 0x10:
                self.loop(value)
            elif len(self.sent) == self.room:
                return False
            else:
                self.sent += bytes([value])
            self.thr_interrupt = False
            self.settle()
            self.thr_interrupt = True
        elif offset == DATA:
            self.divisor_low = value
        elif offset == IER and self.lcr & 0x80:
            self.divisor_high = value
        elif offset == IER:
            self.thr_interrupt |= bool(value & 2 and not self.ier & 2)
            self.ier = value & 0x0F
        elif offset == FCR:
            if bool(value & 1) != self.fifos or value & 3 == 3:
                self.looped.clear()
            self.fifos = bool(value & 1)
            self.trigger = value >> 6 if self.fifos else 0
        elif offset == LCR:
            self.lcr = value
        elif offset == MCR:
            before = self.modem()
            self.mcr = value & 0x1F
            now = self.modem()
            self.deltas |= (before ^ now) >> 4 & 0b1011
            self.deltas |= (before & ~now & 0x40) >> 4
        elif offset == SCRATCH:
            self.scratch = value
        self.settle()
        return True

    def loop(self, value: int) -> None:
        if len(self.looped) < (16 if self.fifos else 1):
            self.looped.append(value)
        else:
            self.errors |= 2
            if not self.fifos:
                self.looped = [value]

    def input(self, data: bytes, errors: int) -> None:
        self.line += [(byte, errors) for byte in data]
        self.settle()


ROOM = 16

# Random registers alone rarely meet, so those that switch something get likely values.
_values = {
    IER: st.sampled_from([0, 1, 2, 3, 5, 7, 0xF, 0xFF]),
    FCR: st.sampled_from([0, 1, 3, 7, 0x41, 0x81, 0xC1, 0xC7, 0xFE]),
    LCR: st.sampled_from([3, 3, 3, 0x80, 0x83, 0xBF]),
    MCR: st.sampled_from([0, 2, 3, 0xB, 0x10, 0x10, 0x1A, 0x1F, 0xFF]),
}
_writes = st.integers(0, 7).flatmap(
    lambda offset: st.tuples(st.just(offset), _values.get(offset, st.integers(0, 255)))
)


class RegistersAgainstModel(RuleBasedStateMachine):
    """Whatever a guest and its user do, in any order: answers, edges and bytes are the model's."""

    @initialize(flow_control=st.booleans())
    def start(self, flow_control: bool) -> None:
        self.flow_control = flow_control
        self.wire = Wire(capacity=ROOM, flow_control=flow_control)
        self.model = Model(ROOM, flow_control)

    @rule(offset=st.integers(0, 7))
    def read(self, offset: int) -> None:
        assert inb(self.wire.serial, offset) == self.model.read(offset)

    @rule(write=_writes)
    def write(self, write: tuple[int, int]) -> None:
        offset, value = write
        serial, model = self.wire.serial, self.model
        done = access(serial, offset, bytes([value])) is not None
        assert done == model.write(offset, value)
        if not done:  # as the run loop has it: drain, and try again
            self.look_at_output()
            out(serial, offset, value)
            model.write(offset, value)

    @rule(data=st.binary(min_size=1, max_size=20))
    def type(self, data: bytes) -> None:
        self.wire.serial.write(data)
        self.model.input(data, 0)

    @rule()
    def send_break(self) -> None:
        self.wire.serial.send_break()
        self.model.input(b"\0", 0x10)

    @rule()
    def another_takes_over(self) -> None:
        state = json.loads(json.dumps(self.wire.serial.state()))
        serial = Serial(irq=self.wire.fd, capacity=ROOM, flow_control=self.flow_control)
        serial.restore(state)
        self.wire.serial.close()
        self.wire.serial = serial

    @rule()
    def look_at_output(self) -> None:
        assert self.wire.serial.read() == self.model.sent
        self.model.sent = b""

    @invariant()
    def edges(self) -> None:
        if hasattr(self, "wire"):
            assert self.wire.edges() == self.model.edges
            assert self.wire.serial.pending == len(self.model.line)
            self.model.edges = 0

    def teardown(self) -> None:
        if hasattr(self, "wire"):
            self.wire.close()


RegistersAgainstModel.TestCase.settings = settings(max_examples=150, stateful_step_count=80)
TestRegistersAgainstModel = RegistersAgainstModel.TestCase


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
