"""Guests to stop: the same little program in every mode."""

from __future__ import annotations

import pytest

import pykvm
from pykvm.debug import probe

ENTRY = 0x8000
CELL = 0x9000

MODES = (("real16", 0), ("prot32", 0), ("prot32", 3), ("long64", 0), ("long64", 3))

COUNT = """
start:
    mov ecx, 3
    mov dx, 0x60
top:
    inc ebx
    mov [0x9000], ebx
bottom:
    dec ecx
    jnz top
    mov al, 7
    out 0xf4, al
    jmp $
"""


def machine(
    code: str = COUNT, mode: str = "long64", ring: int = 0, **options: object
) -> pykvm.Machine:
    """A machine with the code at ENTRY, ready to run; port 0xf4 ends it, 0x60 answers 1."""
    m = pykvm.Machine(**options)  # type: ignore[arg-type]
    m.load(pykvm.asm(code, mode=mode, at=ENTRY))  # type: ignore[arg-type]
    for cpu in m.cpus:
        cpu.enter(mode, entry=ENTRY, ring=ring, iopl=3, stack=0x7800 - 0x200 * cpu.index)
    m.pio.stop(0xF4)
    m.pio.constant(0x60, 1)
    return m


def make(made: list[pykvm.Machine], *args: object, **options: object) -> pykvm.Machine:
    """One of :func:`machine`'s that is closed when the test ends."""
    m = machine(*args, **options)  # type: ignore[arg-type]
    made.append(m)
    return m


def need(m: pykvm.Machine, way: str) -> None:
    """Skip where this KVM cannot stop a guest of this mode so."""
    problem = m.debugger.obstacle(way, m.cpu)
    if problem:
        pytest.skip(f"probe.obstacle({way!r}, {probe.mode_of(m.cpu.load_sregs())!r}): {problem}")


def need_steps(m: pykvm.Machine) -> None:
    """Skip where it can neither be stepped nor its instructions be followed."""
    problem = m.debugger.obstacle(probe.STEP, m.cpu)
    if problem and m.debugger.cannot_decode(m.cpu):
        pytest.skip(f"probe.obstacle('step'): {problem}; {m.debugger.cannot_decode(m.cpu)}")
