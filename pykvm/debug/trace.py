"""A live trace of exits: C writes them down (``csrc/watch.c``), here they become values."""

from __future__ import annotations

import mmap
import time

from pykvm._abi import ffi, lib
from pykvm.debug.events import NAMES, Event, Filter, Recording
from pykvm.debug.span import Span
from pykvm.errors import ClosedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

LAST = 1 << 20
"""Events that are kept of each vCPU unless asked otherwise; 64 bytes each, used as they come."""
MOST = 1 << 26
_BYTES: int = ffi.sizeof("struct pykvm_event")
_MEMORY_LIKE = (lib.KVM_EXIT_IO, lib.KVM_EXIT_MMIO, lib.KVM_EXIT_X86_RDMSR, lib.KVM_EXIT_X86_WRMSR,
                lib.KVM_EXIT_HYPERCALL, lib.KVM_EXIT_DEBUG)  # fmt: skip


_TSC_IS_GOOD = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
"""Where the kernel says "tsc" it has found the TSC to be steady, and the same on all processors."""
_BASELINE = 10_000_000
"""ns over which the TSC's rate is measured, at least."""
_READINGS = 5


class _Clock:
    """What time events have: the TSC where the kernel trusts it too, else CLOCK_MONOTONIC."""

    def __init__(self) -> None:
        try:
            with open(_TSC_IS_GOOD) as file:
                ticks = file.read().strip() == "tsc"
        except OSError:
            ticks = False
        self.ticks = ticks
        self._c = ffi.new("struct pykvm_events *", {"ticks": ticks})
        self._anchor = self._both()
        self._rate = 0.0 if ticks else 1e-9

    def _both(self) -> tuple[int, int]:
        """Both times of one moment: the closest of some readings, as a core may be lost between."""
        readings = []
        for _ in range(_READINGS):
            before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            ticks = self.now()
            after = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            readings.append((after - before, ticks, before))
        return min(readings)[1:]

    def now(self) -> int:
        """The time as events have it."""
        return int(lib.pykvm_events_now(self._c))

    @property
    def rate(self) -> float:
        """Seconds of one unit of it. Measured once, from the first trace on."""
        while not self._rate:
            ticks, ns = self._both()
            if ns - self._anchor[1] >= _BASELINE:
                self._rate = (ns - self._anchor[1]) * 1e-9 / (ticks - self._anchor[0])
        return self._rate


_clock: _Clock | None = None


def _the_clock() -> _Clock:
    global _clock
    if _clock is None:
        _clock = _Clock()
    return _clock


class _Events:
    """The ring of one vCPU, and its memory."""

    def __init__(self, capacity: int, filters: Any, count: int, rip: bool) -> None:
        self.capacity = capacity
        self._memory = mmap.mmap(-1, capacity * _BYTES)  # zero pages until they are written
        self._items = ffi.from_buffer("struct pykvm_event[]", self._memory)
        self._filters = filters
        self.c = ffi.new(
            "struct pykvm_events *",
            {"events": self._items, "capacity": capacity, "filters": filters,
             "filter_count": count, "rip": rip, "ticks": _the_clock().ticks},
        )  # fmt: skip

    @property
    def lost(self) -> int:
        head: int = self.c.head
        return max(0, head - self.capacity)

    def read(self) -> tuple[Any, list[int]]:
        """A copy of the ring, and the places of its events, oldest first; also while it is used."""
        head = self.c.head
        used = min(head, self.capacity)
        copy = ffi.from_buffer("struct pykvm_event[]", self._memory[: used * _BYTES])
        first = head - used
        if self.c.head != head:  # what was overwritten meanwhile, and one that may be half-written
            first = max(first, self.c.head + 1 - self.capacity)
        return copy, [number & (self.capacity - 1) for number in range(first, head)]


class Trace(Span, Recording):
    """The exits of some vCPUs from ``with`` to its end. Made by ``Machine.trace()``.

    It may be looked at while it is on, and while the machine runs.
    """

    def __init__(
        self,
        vcpus: Iterable[Any],
        filters: Iterable[str] = (),
        *,
        last: int = LAST,
        rip: bool = False,
        stats: Callable[[], dict[str, dict[str, int]]] | None = None,
    ) -> None:
        """Make it; nothing is traced yet.

        Args:
            vcpus: the ``struct pykvm_vcpu *`` to watch.
            filters: see :class:`~pykvm.debug.events.Filter`; none: everything.
            last: how many events of each vCPU are kept, the last ones.
            rip: have KVM store the registers at every exit, so that each event has its RIP.
            stats: reads KVM's statistics.

        Raises:
            ValueError: a filter makes no sense, or ``last``.
        """
        if not 1 <= last <= MOST:
            raise ValueError(f"last must be 1..{MOST}, not {last}")
        parsed = [Filter(text) for text in filters]
        table = ffi.new(
            "struct pykvm_event_filter[]",
            [
                {"reason": f.reason, "first": f.first, "last": f.last, "direction": f.direction}
                for f in parsed
            ],
        )
        capacity = 1 << max(0, last - 1).bit_length()
        self._vcpus = list(vcpus)
        self._rings = [_Events(capacity, table, len(parsed), rip) for _ in self._vcpus]
        self._read_stats = stats
        self._before: dict[str, dict[str, int]] = {}
        self._after: dict[str, dict[str, int]] | None = None
        self._began = 0
        self._on = False

    def begin(self) -> None:
        """Switch it on.

        Raises:
            ValueError: one of the vCPUs is traced already.
        """
        if any(c.events for c in self._vcpus):
            raise ValueError("this machine is traced already: end that trace first")
        if self._read_stats is not None:
            self._before = self._read_stats()
        self._began = _the_clock().now()
        self._switch(True)
        self._on = True

    def end(self) -> None:
        """Switch it off. Idempotent. What it holds stays."""
        if not self._on:
            return
        self._on = False
        self._switch(False)
        if self._read_stats is not None:
            try:
                self._after = self._read_stats()
            except ClosedError:  # the machine went first, and its statistics with it
                self._after = {}

    def _switch(self, on: bool) -> None:
        for c, ring in zip(self._vcpus, self._rings, strict=True):
            c.events = ring.c if on else ffi.NULL

    @property
    def events(self) -> list[Event]:  # type: ignore[override]
        """What was traced so far, in order of time; a list of its own each time."""
        found, rate = [], _the_clock().rate
        for c, ring in zip(self._vcpus, self._rings, strict=True):
            raw, places = ring.read()
            found += [_event(raw[place], c.index, self._began, rate) for place in places]
        return sorted(found, key=lambda event: event.time)

    @property
    def lost(self) -> int:  # type: ignore[override]
        """Exits that were wanted and overwritten by later ones."""
        return sum(ring.lost for ring in self._rings)

    @property
    def passed(self) -> int:
        """Exits that no filter wanted."""
        return sum(ring.c.passed for ring in self._rings)

    @property
    def stats(self) -> dict[str, dict[str, int]]:  # type: ignore[override]
        """How KVM's statistics (api.rst 4.133) grew meanwhile; what did not is left out."""
        if self._read_stats is None:
            return {}
        after = self._read_stats() if self._after is None else self._after
        grown = {}
        for what, values in after.items():
            before = self._before.get(what, {})
            grown[what] = {
                name: value - before.get(name, 0)
                for name, value in values.items()
                if value != before.get(name, 0)
            }
        return grown

    def __repr__(self) -> str:
        kept = sum(min(ring.c.head, ring.capacity) for ring in self._rings)
        return f"<Trace {'on' if self._on else 'off'}, {kept} events, {self.lost} lost>"


def _event(raw: Any, cpu: int, began: int, rate: float) -> Event:
    flags, reason, size = raw.flags, raw.reason, raw.size
    is_write = bool(flags & lib.PYKVM_EVENT_WRITE)
    done = bool(flags & lib.PYKVM_EVENT_DONE)
    return Event(
        (raw.time - began) * rate,
        cpu,
        NAMES.get(reason, f"exit {reason}"),
        address=raw.address if reason in _MEMORY_LIKE else None,
        size=size,
        count=raw.count,
        is_write=is_write,
        data=raw.data if size and (is_write or done) else None,
        rip=raw.rip if flags & lib.PYKVM_EVENT_RIP else None,
        inside=raw.inside * rate,
        spent=raw.spent * rate if done else None,
        number=raw.exit,
    )
