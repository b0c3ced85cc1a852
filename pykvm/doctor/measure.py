"""Measurements of a KVM: what ring 0 is, and what an exit costs. Each takes a few milliseconds.

Every loop is bounded by time, not by count, so a machine that is a thousand times slower takes no
longer; it just counts less. The guests are a few bytes each and need no assembler.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pykvm.machine import Machine
from pykvm.result import TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.result import RunResult

    Sample = Callable[[float], tuple[float, int]]

SLICE = 0.004
"""Seconds of one sample; long beside the tens of microseconds that a run takes to start and end."""
SAMPLES = 5
"""Samples of which the median counts. One more is taken first, to warm up, and forgotten."""
LONGEST = 0.128
"""Seconds that a sample may grow to where nothing at all fits into ``SLICE``."""
EMULATED = 20.0
"""Ring 0 this many times slower than ring 3 is emulated. Natively they are alike; emulated there
are three orders of magnitude between them."""

CODE_AT = 0x100000
PORT = 0x80

COUNT_CODE = bytes.fromhex("48ffc1 ebfb")
"""``l: inc rcx; jmp l``: RCX is the number of turns, two instructions each."""
OUT_CODE = bytes.fromhex("e680" * 63 + "eb80")
"""``l: out 0x80, al`` 63 times, ``jmp l``: where ring 0 is emulated the jump costs too."""


@dataclass(frozen=True)
class Timing:
    """What something takes.

    Attributes:
        what: in words.
        ns: nanoseconds, the median of the samples.
        low, high: the fastest and the slowest sample, in nanoseconds.
    """

    what: str
    ns: float
    low: float
    high: float

    @property
    def per_second(self) -> float:
        """How many of them fit into a second."""
        return 1e9 / self.ns


@dataclass(frozen=True)
class Ring0:
    """Whether the guest's kernel mode runs on the processor or in KVM's emulator.

    Attributes:
        verdict: ``"native"`` or ``"emulated"``.
        ring0_ns, ring3_ns: nanoseconds an instruction, of a loop of two, in 64-bit mode.
        ratio: how many times slower ring 0 is.
    """

    verdict: str
    ring0_ns: float
    ring3_ns: float
    ratio: float


def ring0(path: str = "/dev/kvm") -> Ring0:
    """Time the same loop, which makes no exit, in ring 0 and in ring 3."""
    ring0_ns, ring3_ns = instruction_ns(0, path), instruction_ns(3, path)
    ratio = ring0_ns / ring3_ns
    return Ring0("emulated" if ratio >= EMULATED else "native", ring0_ns, ring3_ns, ratio)


def instruction_ns(ring: int, path: str = "/dev/kvm") -> float:
    """Nanoseconds an instruction takes in a ring of 64-bit mode: the best of a few samples.

    Whatever else the host does only adds to it, so the least is the truest.
    """
    with Machine(memory="2M", path=path) as m:
        m.load(COUNT_CODE, at=CODE_AT)
        m.cpu.enter("long64", entry=CODE_AT, ring=ring)

        def sample(seconds: float) -> tuple[float, int]:
            before = m.cpu.rcx
            elapsed = _run(m, seconds).seconds
            return elapsed, 2 * (m.cpu.rcx - before)

        return min(_samples(sample))


def _run(m: Machine, seconds: float) -> RunResult:
    """Run a guest that loops for ever."""
    result = m.run(timeout=seconds)
    if result.reason != TIMEOUT:
        raise RuntimeError(f"a guest that loops for ever ended: {result}")
    return result


def _exits(what: str, path: str, ring: int, serve: Callable[[Machine], object]) -> Timing:
    """Time the exits of a guest that does nothing but writing to a port."""
    with Machine(memory="2M", path=path) as m:
        m.load(OUT_CODE, at=CODE_AT)
        m.cpu.enter("long64", entry=CODE_AT, ring=ring, iopl=ring)
        serve(m)

        def sample(seconds: float) -> tuple[float, int]:
            result = _run(m, seconds)
            return result.seconds, result.exits

        return _median(what, sample)


def _calls(what: str, call: Callable[[], object]) -> Timing:
    """Time a call into KVM, again and again."""

    def sample(seconds: float) -> tuple[float, int]:
        count = 0
        start = time.perf_counter()
        while True:
            call()
            count += 1
            elapsed = time.perf_counter() - start
            if elapsed >= seconds:
                return elapsed, count

    return _median(what, sample)


def _median(what: str, sample: Sample) -> Timing:
    taken = sorted(_samples(sample))
    return Timing(what, taken[len(taken) // 2], taken[0], taken[-1])


def _samples(sample: Sample) -> list[float]:
    """Take samples; nanoseconds of each of what they counted.

    Args:
        sample: takes one of about so many seconds: seconds it took, and how many it counted.
    """
    seconds = SLICE
    while seconds <= LONGEST:
        if sample(seconds)[1]:
            taken = [sample(seconds) for _ in range(SAMPLES)]
            if any(count for _, count in taken):
                return [elapsed * 1e9 / count for elapsed, count in taken if count]
        seconds *= 2  # a machine so slow that it needs more time
    raise RuntimeError(f"nothing happened in {LONGEST * 1000:.0f} ms")


# ---- the costs ---------------------------------------------------------------------------------


def _pio_c(path: str) -> Timing:
    return _exits("port write, served in C", path, 0, lambda m: m.pio.ignore(PORT))


def _pio_python(path: str) -> Timing:
    return _exits(
        "port write, served by a Python handler", path, 0, lambda m: m.on_pio(PORT, lambda _: None)
    )


def _pio_ring3(path: str) -> Timing:
    return _exits("port write from ring 3, served in C", path, 3, lambda m: m.pio.ignore(PORT))


def _ioctl(path: str) -> Timing:
    from pykvm.kvm import Kvm

    with Kvm(path) as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        return _calls("vCPU ioctl from Python (KVM_GET_REGS)", vcpu.get_regs)


def _machine(path: str) -> Timing:
    return _calls("a machine, made and closed", lambda: Machine(memory="2M", path=path).close())


def _machine_irqchip(path: str) -> Timing:
    return _calls(
        "a machine with interrupt controllers, made and closed",
        lambda: Machine(memory="2M", irqchip=True, path=path).close(),
    )


COSTS: dict[str, Callable[[str], Timing]] = {
    "pio_c": _pio_c,
    "pio_python": _pio_python,
    "pio_ring3": _pio_ring3,
    "ioctl": _ioctl,
    "machine": _machine,
    "machine_irqchip": _machine_irqchip,
}
"""What :func:`pykvm.doctor.examine` measures, by the names it uses: ``COSTS["pio_c"](path)``."""
