"""Valid processor states to break: plain fakes of ``kvm_sregs`` and ``kvm_regs``."""

from __future__ import annotations

from pykvm.arch.x86_64 import modes, segments
from pykvm.arch.x86_64.regs import SEGMENTS, Regs, Sregs

RAM = 1 << 20


class Baseline:
    """A valid state with its memory."""

    def __init__(self) -> None:
        self.sregs, self.regs, self.memory = Sregs(), Regs(), bytearray(RAM)

    def enter(self, mode: str, ring: int = 0) -> Baseline:
        modes.enter(
            mode, sregs=self.sregs, regs=self.regs, memory=self.memory, entry=0x8000, ring=ring
        )
        return self


def reset() -> Baseline:
    """A processor after reset."""
    return Baseline()


def real16() -> Baseline:
    return Baseline().enter("real16")


def prot32() -> Baseline:
    return Baseline().enter("prot32")


def prot32_ring3() -> Baseline:
    return Baseline().enter("prot32", 3)


def pae() -> Baseline:
    """32-bit protected mode under PAE paging; the tables are for walks to read, and empty."""
    state = Baseline().enter("prot32")
    state.sregs.cr0 |= 0x80000000
    state.sregs.cr4 |= 0x20
    state.sregs.cr3 = 0x1000
    return state


def long64() -> Baseline:
    return Baseline().enter("long64")


def long64_ring3() -> Baseline:
    return Baseline().enter("long64", 3)


def compat32() -> Baseline:
    """32-bit code under long mode (compatibility mode)."""
    state = Baseline().enter("long64")
    state.sregs.cs.l, state.sregs.cs.db = 0, 1
    return state


def v8086() -> Baseline:
    """Virtual-8086 mode under protected mode."""
    state = Baseline().enter("prot32")
    for name in SEGMENTS:
        segments.v8086(0x800).apply(getattr(state.sregs, name))
    state.regs.rip, state.regs.rflags = 0, 0x20002
    return state


BASELINES = {
    make.__name__: make
    for make in (reset, real16, prot32, prot32_ring3, pae, long64, long64_ring3, compat32, v8086)
}
