"""Machines whose guest dirties pages, and the floor in C for putting them back."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from time import perf_counter_ns

import pykvm
from benches.measure import BenchError, Sampler
from benches.reference import Guest, build, pointer
from pykvm.kvm.handle import Closing
from pykvm.snapshot.reset import Tracking

ENTRY = 0x8000
INPUT = 0x20000
DATA = 0x100000
PAGE = 4096
MEMORY = "16M"

# Writes to RCX pages from RDI on; the input's first 8 bytes are added to RDI. In ring 0 with a HLT
# at the end, which is no access that needs completing.
_WRITER = f"add rdi, [{INPUT}]; l: mov [rdi], rcx; add rdi, {PAGE}; dec rcx; jnz l; hlt"


def machine(pages: int, mode: str | None = None) -> pykvm.Machine:
    """A machine that will dirty so many pages.

    Args:
        pages: how many.
        mode: how changes are tracked: "manual", "log" or "whole"; None: as is best.
    """
    m = pykvm.Machine(memory=MEMORY)
    m.load(pykvm.asm(_WRITER, mode="long64"), at=ENTRY)
    m.cpu.enter("long64", entry=ENTRY)
    m.cpu.rdi, m.cpu.rcx = DATA, pages
    if mode is not None:
        m._tracking = Tracking(m.vm, m.memory, mode)
    return m


def fuzzed(
    m: pykvm.Machine, s: pykvm.Snapshot, runs: int, inputs: Iterator[bytes], exact: bool
) -> Sampler:
    """Run and reset, in ns each, through the fuzz loop in C, outcomes and all."""

    def sample() -> float:
        batch = [next(inputs) for _ in range(runs)]
        start = perf_counter_ns()
        outcomes = m.fuzz(s, batch, write_at=INPUT, exact=exact, timeout=None, batch=runs)
        ends = {outcome.reason for outcome in outcomes}
        elapsed = perf_counter_ns() - start
        if ends != {pykvm.result.HALTED}:
            raise BenchError(f"a run ended otherwise: {ends}")
        return elapsed / runs

    return sample


class _Call(ctypes.Structure):
    _fields_ = (("request", ctypes.c_ulong), ("arg", ctypes.c_void_p))


class Floor(Closing):
    """The same guest in C: pages that are known are copied back, and the same ioctls made.

    Args:
        m: the machine, which has not run yet.
        s: its snapshot.
        exact: whether the ioctls of an exact reset are made.
    """

    def __init__(self, m: pykvm.Machine, s: pykvm.Snapshot, exact: bool) -> None:
        self._c = build("floor.c")
        self._c.floor_new.restype = ctypes.c_void_p
        self._c.floor_run.restype = ctypes.c_int64
        error = ctypes.c_int()
        guest = Guest(m)
        self._c.floor_prepare()
        self._floor = ctypes.c_void_p(self._c.floor_new(ctypes.byref(guest), ctypes.byref(error)))
        if not self._floor:
            raise BenchError(f"the C floor: {os.strerror(-error.value)}")
        s.restore(m)
        assert m._plan is not None
        self._plan = plan = m._plan[1]  # its structures are what the ioctls are given
        calls: list[_Call] = []
        if exact:
            for number in range(plan.timeless):
                each = plan.c.calls[number]
                calls.append(_Call(each.request, pointer(each.arg)))
        self._calls = (_Call * max(len(calls), 1))(*calls)
        self._count = len(calls)

    def sampler(self, runs: int, pages: list[int]) -> Sampler:
        """Run and reset, in ns each."""
        known = (ctypes.c_uint64 * len(pages))(*pages)

        def sample() -> float:
            elapsed: int = self._c.floor_run(
                self._floor, ctypes.c_uint64(runs), known, ctypes.c_uint64(len(pages)),
                self._calls, ctypes.c_uint64(self._count),
            )  # fmt: skip
            if elapsed < 0:
                raise BenchError(f"the C floor: {os.strerror(-elapsed)}")
            return elapsed / runs

        return sample

    def close(self) -> None:
        """Give the VM back."""
        floor, self._floor = self._floor, ctypes.c_void_p()
        if floor:
            self._c.floor_delete(floor)


def dirtied(s: pykvm.Snapshot, m: pykvm.Machine) -> list[int]:
    """The pages that a run changes: what the floor is told."""
    if m.run(timeout=10).reason != pykvm.result.HALTED:
        raise BenchError("the guest did not come to its HLT")
    with m.snapshot() as after:
        pages: list[int] = s.diff(after).pages
    s.restore(m)
    return pages


def nothing() -> Iterator[bytes]:
    """The same input for ever."""
    while True:
        yield bytes(8)
