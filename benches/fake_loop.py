"""What does an exit cost us, KVM not counted?

The whole loop, C and Python, over ``pykvm_fake_enter``: the same code, with the ioctl replaced by
a script. On hardware where an exit takes a microsecond these are the figures that matter. The
reference is the least that a C loop over the same fake can do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from time import perf_counter_ns
from typing import Any

from benches.measure import OF_OURS, BenchError, Goal, Result, compare, take_turns
from benches.reference import build, pointer
from pykvm import result as reasons
from pykvm._abi import ffi, lib
from pykvm.devices.bus import Bus
from pykvm.vcpu_thread import NEVER, Runner

C_ONLY = False

PORT = 0xE9
VALUE = 3
C_EXITS = 400_000
PYTHON_EXITS = 40_000


class _FakeVcpu:
    """As much of a ``pykvm.kvm.Vcpu`` as a :class:`Runner` looks at."""

    fd = -1
    kind = "vcpu"

    def __init__(self) -> None:
        self._pages = ffi.new("char[]", 3 * 4096)
        self.kvm_run = ffi.cast("struct kvm_run *", self._pages)


class _Fake:
    """A runner over a guest that writes VALUE to PORT for ever."""

    def __init__(self) -> None:
        slots: list[Any] = []
        self.pio, mmio = Bus("pio", slots), Bus("mmio", slots)
        vcpu: Any = _FakeVcpu()
        self.runner = Runner(vcpu, 0, slots, (self.pio, mmio), {}, {}, True)
        exit = {"reason": lib.KVM_EXIT_IO, "address": PORT, "size": 1, "count": 1, "is_write": 1}
        self._script = ffi.new("struct pykvm_fake_exit[]", [exit | {"data": bytes([VALUE])}])
        self._fake = ffi.new("struct pykvm_fake *", {"script": self._script, "count": 1})
        self.enter = ffi.addressof(lib, "pykvm_fake_enter")
        self.runner.c.fake = self._fake
        self.runner.c.enter = self.enter

    def ours(self, exits: int) -> Callable[[], float]:
        """Samples of the loop as ``Machine.run`` drives it, in ns an exit."""

        def sample() -> float:
            start = perf_counter_ns()
            end = self.runner.run(NEVER, exits)
            elapsed = perf_counter_ns() - start
            if end.reason != reasons.LIMIT:
                raise BenchError(f"the fake run ended early: {end.reason}")
            return elapsed / exits

        return sample

    def least(self, exits: int) -> Callable[[], float]:
        """Samples of the reference, in ns an exit."""
        loop = build("fake_loop.c").fake_loop
        loop.restype = ctypes.c_int64
        loop.argtypes = (ctypes.c_void_p,) * 3 + (ctypes.c_uint64, ctypes.c_void_p)

        def sample() -> float:
            total, c = ctypes.c_uint64(), self.runner.c
            addresses = pointer(self.enter), pointer(c), pointer(c.run)
            elapsed: int = loop(*addresses, exits, ctypes.byref(total))
            if elapsed < 0 or total.value != exits * VALUE:
                raise BenchError(f"the C reference's loop: {elapsed}, sum {total.value}")
            return elapsed / exits

        return sample


def measure(pairs: int) -> Iterator[Result]:
    """C actions, then Python handlers that look at less and at more of the exit."""
    claims: dict[str, Callable[[Bus], object]] = {
        "ignore": lambda pio: pio.ignore(PORT),
        "fifo": lambda pio: pio.fifo(PORT, sink=len),
        "log": lambda pio: pio.log(PORT, sink=len),
    }
    for name, claim in claims.items():
        fake = _Fake()
        claim(fake.pio)
        goal = Goal(50, OF_OURS) if name != "log" else None
        note = "" if goal else "Python makes an object of every record as it drains"
        yield _one(f"fake-loop/c-{name}", fake, C_EXITS, pairs, goal, note)

    fake = _Fake()
    fake.pio.handle(PORT, lambda exit: None)
    note = "a fresh exit object each time, which the handler does not look at"
    yield _one("fake-loop/handler", fake, PYTHON_EXITS, pairs, Goal(300, OF_OURS), note)

    fake, seen = _Fake(), [0]

    def add(exit: Any) -> None:
        seen[0] += exit.value

    fake.pio.handle(PORT, add)
    note = "the handler adds exit.value to a sum"
    yield _one("fake-loop/handler-value", fake, PYTHON_EXITS, pairs, None, note)
    if seen[0] != (pairs + 1) * PYTHON_EXITS * VALUE:
        raise BenchError(f"the handler saw {seen[0]}")


def _one(name: str, fake: _Fake, exits: int, pairs: int, goal: Goal | None, note: str) -> Result:
    samplers = [fake.ours(exits), _Fake().least(C_EXITS)]
    return compare(name, "ns/exit", *take_turns(samplers, pairs), goal=goal, note=note)
