"""Recording what a guest is given from outside, and giving it again.

::

    s = m.snapshot()
    with m.record() as log:
        m.run(timeout=1)
    end = m.snapshot()
    s.restore()
    m.replay(log).check()
    assert not end.diff(m.snapshot())

Exits are written down and answered in C (``csrc/replay.c``); what the host does between two exits
passes through here: writes to memory by way of ``m.mem``, and ioctls on the vCPU. A guest that gets
interrupts at times of the host's choosing, or memory written behind our back, is refused.
"""

from __future__ import annotations

from _thread import get_ident

from pykvm import result as reasons
from pykvm._abi import ffi, lib
from pykvm.debug.input_log import (
    COMPLETE,
    HEAD,
    IOCTL,
    IOCTLS,
    MEMORY,
    MOST_BYTES,
    Entry,
    InputLog,
    entry_at,
    ioctl_name,
    msrs_size,
    padded,
)
from pykvm.errors import BusyError, ReplayError
from pykvm.kvm import ioctl
from pykvm.vcpu_thread import End

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Self

    from pykvm.machine import Machine
    from pykvm.memory import Region
    from pykvm.result import RunResult

_FIRST_ROOM = 1 << 16
_HARMLESS = ("KVM_GET_", "KVM_CHECK_", "KVM_HAS_", "KVM_TRANSLATE", "KVM_X86_GET_")
_ENDS = {"shutdown": reasons.SHUTDOWN, "internal_error": reasons.INTERNAL_ERROR}


class _Attached:
    """A log at the vCPU of a machine, for the length of a ``with``."""

    def __init__(self, machine: Machine, mode: int) -> None:
        self._machine = machine
        self._runner = machine._runners[0]
        self.c = ffi.new("struct pykvm_log *", {"mode": mode})

    def _begin(self) -> None:
        """Check that it can be, and bring the vCPU to rest between two instructions."""
        machine = self._machine
        if machine.running:
            raise BusyError("a vCPU of this machine is running: stop() it first")
        if self._runner.log is not None:
            raise ReplayError("this machine is recorded or replayed already")
        if len(machine.cpus) != 1:
            raise ReplayError("several vCPUs share memory in an order that nobody can write down")
        if machine.irqchip is not None:
            raise ReplayError(
                "interrupt controllers in the kernel interrupt the guest when the host comes to it,"
                " and KVM does not say at which instruction: use a machine without irqchip"
            )
        if machine._virtio is not None:
            raise ReplayError("virtio devices write guest memory, which is not recorded")
        self._runner.complete()
        machine.cpu.flush()
        self._cr8 = int(self._runner.vcpu.get_sregs().cr8)

    def _attach(self) -> None:
        self._runner.log = self
        self._runner.c.log = self.c

    def _detach(self) -> None:
        self._runner.c.log = ffi.NULL
        self._runner.log = None

    def see(self, outcome: int) -> End | None:
        """What C leaves to Python."""
        raise NotImplementedError


def _place(machine: Machine) -> tuple[list[list[int]], bytes]:
    """What a log says of where it begins: the memory map, and general registers."""
    regions = [
        [r.slot, r.guest_phys_addr, r.memory_size, int(r.readonly)] for r in machine.memory.regions
    ]
    return regions, bytes(ffi.buffer(machine.cpu.vcpu.get_regs()))


class Recorder(_Attached):
    """``Machine.record()``: writes down what the guest is given while a ``with`` lasts."""

    def __init__(self, machine: Machine, limit: int) -> None:
        if not 0 < limit <= MOST_BYTES:
            raise ValueError(f"limit must be 1..{MOST_BYTES}, not {limit}")
        super().__init__(machine, lib.PYKVM_LOG_RECORD)
        self._limit = limit
        self._waiting: list[tuple[int, int, Any]] = []
        self._room: Any = None
        self._broken = ""

    def __enter__(self) -> InputLog:
        debugger = self._machine._debugger
        if debugger is not None and (debugger.breakpoints or debugger.watchpoints):
            raise ReplayError("a debugger's stops are exits of their own: delete() them first")
        self._begin()
        self.log = InputLog(*_place(self._machine))
        self._grow(_FIRST_ROOM)
        self.c.page, self.c.state = self._cr8 << 8, lib.PYKVM_LOG_MARKED
        self._attach()
        self._writes = self._machine.memory.track()
        self._writes.noted = self._written
        ioctl.witnesses.append(self._witness)
        return self.log

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._machine.running:
            raise BusyError("a vCPU of this machine is running: stop() it first")
        try:
            if not self._machine.closed:
                self._runner.complete()  # the answer to the last exit
                self._machine.cpu.flush()
                self._drain()
        finally:
            ioctl.witnesses.remove(self._witness)
            self._writes.noted = None
            self._detach()
        if self._broken and exc is None:
            raise ReplayError(self._broken)
        self.log.data = bytes(ffi.buffer(self._room, self.c.end))
        self.log.exits = self.c.exits

    def _written(self, region: Region, at: int, length: int) -> None:
        if self._runner.owner not in (0, get_ident()):
            self._break("memory was written while the guest ran, and nobody knows when it saw that")
        self._at_a_known_place("memory was written")
        self._waiting.append((MEMORY, region.guest_phys_addr + at, length))
        self.c.waiting = 1

    def _witness(self, handle: Any, name: str, arg: Any) -> None:
        if handle is self._machine.vm:
            if not name.startswith(_HARMLESS):
                self._break(f"{name} on the VM is in no log")
        elif handle is self._runner.vcpu and not name.startswith(_HARMLESS):
            if name not in IOCTLS:
                self._break(f"{name} on the vCPU is in no log")
            if self._runner.owner not in (0, get_ident()):
                self._break(f"{name} was done while the guest ran")
            self._at_a_known_place(f"{name} was done")
            size: int = ffi.sizeof(IOCTLS[name]) if IOCTLS[name] else 0
            if name == "KVM_SET_MSRS":
                size = msrs_size(arg.nmsrs)
            said = bytes(ffi.buffer(ffi.cast("char *", arg), size)) if size else b""
            self._waiting.append((IOCTL, getattr(lib, name), said))
            self.c.waiting = 1

    def _at_a_known_place(self, what: str) -> None:
        if self.c.state == lib.PYKVM_LOG_RAN:
            self._break(f"{what} after the guest was interrupted, at an instruction nobody knows")

    def _break(self, why: str) -> None:
        self._broken = self._broken or f"what was recorded cannot be replayed: {why}"
        raise ReplayError(why)

    def see(self, outcome: int) -> End | None:
        """Before an entry: write down what the host did, and see that there is room."""
        if self.c.broken:
            self._break("registers were set after the guest was interrupted, nobody knows where")
        self._drain()
        self._make_room(lib.PYKVM_LOG_ROOM)
        return None

    def _drain(self) -> None:
        waiting, self._waiting = self._waiting, []
        self.c.waiting = 0
        if waiting and self.c.state == lib.PYKVM_LOG_COMPLETED:
            self._append(COMPLETE, 0, b"")
            self.c.state = lib.PYKVM_LOG_MARKED
        for kind, address, what in waiting:
            said = self._machine.memory.read(address, what) if kind == MEMORY else what
            self._append(kind, address, said)

    def _append(self, kind: int, address: int, said: bytes) -> None:
        self._make_room(HEAD.size + padded(len(said)))
        head = HEAD.pack(kind, 0, 0, 0, 0, len(said), 0, address, 0)
        record = head + said + bytes(padded(len(said)) - len(said))
        ffi.memmove(self._room + self.c.end, record, len(record))
        self.c.end += len(record)

    def _make_room(self, needed: int) -> None:
        if self.c.capacity - self.c.end >= needed:
            return
        if self.c.end + needed > self._limit:
            self._break(f"the log has reached limit={self._limit} bytes")
        self._grow(min(max(2 * self.c.capacity, self.c.end + needed), max(self._limit, needed)))

    def _grow(self, capacity: int) -> None:
        room = ffi.new("uint8_t[]", capacity)
        if self.c.end:
            ffi.memmove(room, self._room, self.c.end)
        self._room = room
        self.c.bytes = room
        self.c.capacity = capacity


class Divergence:
    """Where a replay left its log.

    Attributes:
        number: of the exit, from 1 on.
        expected: the log's, an :class:`~pykvm.debug.input_log.Entry`.
        found: what the guest did instead.
        rip: where.
    """

    __slots__ = ("expected", "found", "number", "rip")

    def __init__(self, number: int, expected: Entry, found: Entry, rip: int) -> None:
        self.number = number
        self.expected = expected
        self.found = found
        self.rip = rip

    def __repr__(self) -> str:
        return (
            f"at exit {self.number} the replay left its log: expected {self.expected.what};"
            f" found {self.found.what} (at rip {self.rip:#x})"
        )


class Replay(_Attached):
    """``Machine.replaying()``: every run in a ``with`` gets its answers from a log."""

    def __init__(self, machine: Machine, log: InputLog) -> None:
        super().__init__(machine, lib.PYKVM_LOG_REPLAY)
        self.log = log
        self._over = ""

    def __enter__(self) -> Self:
        self._begin()
        memory, regs = _place(self._machine)
        if memory != self.log.memory:
            raise ReplayError("the log is of a machine with another memory map")
        if regs != self.log.regs:
            raise ReplayError(_elsewhere(self.log.regs, regs))
        self._data = ffi.from_buffer("uint8_t[]", self.log.data)
        self.c.bytes, self.c.capacity, self.c.end = self._data, len(self.log.data), len(self._data)
        run = self._runner.c.run
        run.request_interrupt_window, run.cr8 = 0, self._cr8
        self._attach()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._machine.running:
            raise BusyError("a vCPU of this machine is running: stop() it first")
        self._detach()
        if self._machine.closed:
            return
        self._runner.complete()
        if self._over in _ENDS:
            self._machine.cpu.ended = _ENDS[self._over]

    def run(self, timeout: float | None = None) -> RunResult:
        """Go on with the replay, as ``Machine.run`` does, to the end of the log."""
        return self._machine.run(timeout)

    def see(self, outcome: int) -> End | None:
        """Do what the log says the host did, or end the run."""
        if outcome == lib.PYKVM_LOGGED:
            self._do()
            return None
        if outcome == lib.PYKVM_DIVERGED:
            return End(reasons.DIVERGED, self._divergence())
        if self.c.open:
            self._over = entry_at(self.log.data, self.c.open - 1)[0].reason
        return End(reasons.REPLAYED, code=self.c.exits)

    def _do(self) -> None:
        entry, self.c.at = entry_at(self.log.data, self.c.at)
        if entry.kind == MEMORY:
            self._machine.memory.load(entry.address, entry.said)
        elif entry.kind == IOCTL:
            name = ioctl_name(entry.address)
            room = ffi.new("char[]", max(len(entry.said), 1))
            ffi.memmove(room, entry.said, len(entry.said))
            ioctl.call(
                self._runner.vcpu, name, ffi.cast("void *", room) if entry.said else ffi.NULL
            )
        else:
            raise ReplayError(f"the log is damaged: {entry!r}")

    def _divergence(self) -> Divergence:
        record = ffi.new("struct pykvm_log_record *")
        said = ffi.new("uint8_t[]", 4096)
        lib.pykvm_log_found(self._runner.c, record, said)
        head = HEAD.unpack(ffi.buffer(record))
        found = Entry(head, bytes(ffi.buffer(said, record.said)), b"")
        expected, _ = entry_at(self.log.data, self.c.at)
        rip = int(self._runner.vcpu.get_regs().rip)
        return Divergence(self.c.exits + 1, expected, found, rip)


def _elsewhere(then: bytes, now: bytes) -> str:
    """Which register is not what it was where the log begins."""
    a, b = (ffi.from_buffer("struct kvm_regs *", each) for each in (then, now))
    for name, _ in ffi.typeof("struct kvm_regs").fields:
        old, new = getattr(a, name), getattr(b, name)
        if old != new:
            return f"the log begins where {name} is {old:#x}, and here it is {new:#x}"
    return "the log begins elsewhere"


__all__ = ["Divergence", "Recorder", "Replay"]
