"""The guests of the benches: endless loops that write AL to a port or to memory that is no RAM.

They run in ring 0 of long mode. kvm-pvm emulates that ring, and its exits are then the cheapest it
has: any cost of ours weighs the most.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns

import pykvm
from benches.measure import BenchError

PORT = 0xE9
DOORBELL = 0x10
GPA = 0xD000_0000
ENTRY = 0x8000
AL = 3

EXITS = 1000
"""Of one sample: some 8 ms, 7 µs of them (or 40, with cold caches) ``run()``'s own. Short, so that
what else happens on the host meets few samples, and pairs of them."""
TIMES = 2
"""How many more of such short samples to take than of long ones."""

BURST = 128
"""Doorbells between two ordinary exits."""

_LOOPS = {
    "pio": f"l: out {PORT:#x}, al; jmp l",
    "mmio": "l: mov [rbx], al; jmp l",
    "pio-doorbell": f"l: .rept {BURST}; out {DOORBELL:#x}, al; .endr; out {PORT:#x}, al; jmp l",
    "mmio-doorbell": f"l: .rept {BURST}; mov [rbx], al; .endr; out {PORT:#x}, al; jmp l",
}


def machine(loop: str) -> pykvm.Machine:
    """A machine that will run one of the loops; what serves its writes is left to the caller."""
    m = pykvm.Machine(memory="2M")
    m.load(pykvm.asm(_LOOPS[loop], mode="long64"), at=ENTRY)
    m.cpu.enter("long64", entry=ENTRY)
    m.cpu.rax = AL
    m.cpu.rbx = GPA
    return m


def bus(m: pykvm.Machine, loop: str) -> pykvm.devices.bus.Bus:
    """The bus that a loop writes to."""
    return m.mmio if loop.startswith("mmio") else m.pio


def address(loop: str) -> int:
    """The port or the guest-physical address that a loop writes to."""
    return GPA if loop.startswith("mmio") else DOORBELL if loop.endswith("doorbell") else PORT


def sampler(m: pykvm.Machine, exits: int) -> Callable[[], float]:
    """Batches of ``Machine.run(max_exits=exits)``, in ns an exit: the whole call, all included."""

    def sample() -> float:
        start = perf_counter_ns()
        result = m.run(max_exits=exits)
        elapsed = perf_counter_ns() - start
        if result.reason != pykvm.result.LIMIT or result.exits != exits:
            raise BenchError(f"meant to take {exits} exits, but: {result}")
        return elapsed / exits

    return sample
