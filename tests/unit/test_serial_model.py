"""The 16550A, register by register, against a plain model."""

from __future__ import annotations

import json

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pykvm.devices.serial import Serial
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

pytestmark = pytest.mark.sanitize


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
