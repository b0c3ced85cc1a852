"""What tests have a pool's processes do: those import this module, and pytest would take longer."""

from __future__ import annotations

import os
import time

import pykvm
from pykvm import result as reasons

COUNTER = 0x20000
"""Where a guest counts how often it ran."""


def counter(machine: pykvm.Machine) -> int:
    """What the guest of this process has counted."""
    return machine.memory.u32[COUNTER]


def pid(machine: pykvm.Machine) -> int:
    return os.getpid()


def double(machine: pykvm.Machine, value: int) -> tuple[int, int, int]:
    """What the guest makes of a number, how often it ran before, and where."""
    before = machine.memory.u32[0x30000]
    machine.memory.u64[0x20000] = value
    assert machine.run(timeout=30).reason == reasons.HALTED
    return machine.cpu.rax, before, os.getpid()


def slowly(machine: pykvm.Machine, value: int) -> tuple[int, int, int]:
    time.sleep(0.2)  # so that every process gets something to do
    return double(machine, value)


def attach(machine: pykvm.Machine) -> None:
    machine.on_pio(0x40, lambda access: 0x5A)


def fail(machine: pykvm.Machine) -> None:
    raise KeyError("mine")
