"""What is said of a run that was cut short."""

from __future__ import annotations

from typing import Any

import pytest

from pykvm.diagnose import incomplete
from pykvm.result import CpuState, RunResult

NOBODY: Any = None
"""The vCPU that ended a run which none did."""


def state(code: bytes, *, halted: bool = False, interrupts: bool = False) -> CpuState:
    return CpuState(1, 0x8000, code, halted, interrupts)


@pytest.mark.parametrize(
    ("cpu", "words"),
    [
        (state(bytes(16)), "cpu 1 executes zeros (00 00 is ADD [RAX],AL): nothing was loaded"),
        (state(b"\xeb\xfe" + bytes(14)), ""),
        (state(b""), ""),
        (state(bytes(16), halted=True), "cpu 1 executed HLT with interrupts off: it never wakes"),
        (state(bytes(16), halted=True, interrupts=True), ""),
    ],
)
def test_a_timeout_says_what_the_guest_is_likely_doing(cpu: CpuState, words: str) -> None:
    result = RunResult("timeout", cpus=(cpu,))
    told = str(incomplete(result, NOBODY))
    assert told.startswith(f"{result}\n{words}" if words else f"{result}")
    assert words or told == str(result)


def test_a_run_that_went_well_needs_no_words() -> None:
    assert incomplete(RunResult("halted"), NOBODY) is None
    assert incomplete(RunResult("interrupted", cpus=(state(bytes(16)),)), NOBODY) is None
