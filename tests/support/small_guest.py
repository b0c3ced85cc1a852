"""A few instructions in a machine, run to their end."""

from __future__ import annotations

import pykvm

GENEROUS = 60.0
"""Seconds; a run that needs them hangs."""


def start(m: pykvm.Machine, text: str, mode: str = "long64", **options: int) -> None:
    """Assemble at 0x8000 and make the first vCPU ready to run it."""
    m.load(pykvm.asm(text, mode=mode, at=0x8000))  # type: ignore[arg-type]
    m.cpu.enter(mode, entry=0x8000, **options)


def run(m: pykvm.Machine) -> pykvm.RunResult:
    """Run it until something ends that."""
    return m.run(timeout=GENEROUS)
