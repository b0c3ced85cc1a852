"""What this process holds of the host: file descriptors, threads, KVM's mappings.

A machine that was closed must leave nothing behind. Taking a :class:`Holdings` before and after,
and comparing, finds what it did leave, and says what it is.
"""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from dataclasses import dataclass

#: Parts of a mapping's name in /proc/self/maps that only a virtual machine has.
_KVM_MAPPINGS = ("kvm-vcpu", "kvm-vm", "memfd:", "guest_memfd")


def _fds() -> Counter[str]:
    """Open file descriptors, counted by what they point at (an inode number is left off)."""
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:  # the descriptor of the listing itself
            continue
        kind, _, rest = target.partition(":[")  # socket:[4711], but anon_inode:[eventfd]
        found[kind if rest.rstrip("]").isdigit() else target] += 1
    return found


def _threads() -> Counter[str]:
    """Threads of the process as the kernel sees them, by name: C's as well as Python's."""
    found: Counter[str] = Counter()
    for tid in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{tid}/comm", encoding="utf-8", errors="replace") as comm:
                found[comm.read().strip()] += 1
        except OSError:  # ended meanwhile
            continue
    return found


def _mappings() -> Counter[str]:
    """Mappings that belong to KVM or to guest memory, by name."""
    found: Counter[str] = Counter()
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            name = " ".join(line.split()[5:])  # none for anonymous memory
            if any(part in name for part in _KVM_MAPPINGS):
                found[name] += 1
    return found


def mappings_of(name: str) -> list[str]:
    """The lines of /proc/self/maps with a name in them."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        return [line for line in maps if name in line]


def mapped_bytes() -> int:
    """Size of the whole address space in bytes: anonymous guest memory has no name to count."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Holdings:
    """A count of what the process holds at one moment."""

    fds: Counter[str]
    threads: Counter[str]
    mappings: Counter[str]

    @classmethod
    def now(cls) -> Holdings:
        """Count, after the garbage collector has run."""
        gc.collect()
        return cls(_fds(), _threads(), _mappings())

    def grown_since(self, before: Holdings) -> dict[str, int]:
        """What there is more of than there was, as ``{"fd anon_inode:kvm-vm": 2}``."""
        kinds = (
            ("fd", self.fds - before.fds),
            ("thread", self.threads - before.threads),
            ("mapping", self.mappings - before.mappings),
        )
        return {f"{kind} {name}": n for kind, more in kinds for name, n in sorted(more.items())}


def assert_nothing_left(before: Holdings, patience: float = 0.5) -> None:
    """Fail with a list of what is still held that was not held before.

    A joined thread's entry under /proc may outlive ``pthread_join`` by a moment, hence the
    patience: the check is repeated until it passes or ``patience`` seconds are over.
    """
    end = time.monotonic() + patience
    while grown := Holdings.now().grown_since(before):
        if time.monotonic() > end:
            listed = ", ".join(f"{n} × {what}" for what, n in grown.items())
            raise AssertionError(f"left behind: {listed}")
        os.sched_yield()
