"""The CMOS memory with the real-time clock (MC146818), at ports 0x70 and 0x71 of a PC.

The clock shows the host's time in UTC, and can be set. It has no alarm and makes no interrupts:
register C, which would name their reason, reads 0.
"""

from __future__ import annotations

import time

from pykvm.arch.x86_64.pc import CMOS_CENTURY
from pykvm.devices.base import ByteDevice, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY = 0, 2, 4, 6, 7, 8, 9, CMOS_CENTURY
"""Registers of the clock."""
_CLOCK = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)

A, B, C, D = 0xA, 0xB, 0xC, 0xD
A_UPDATING = 0x80
B_SET, B_BINARY, B_24_HOURS = 0x80, 0x04, 0x02
D_VALID = 0x80
PM = 0x80

SHUTDOWN = 0x0F
"""Why the last reset was made, as BIOSes have it: plain memory here."""

_UPDATE = 0.002
"""For how long before each second the clock says that it is updating. The data sheet says 244 µs
and 2 ms while it does; a reader that saw it idle needs time to read seven registers."""

KIB, MIB = 1 << 10, 1 << 20


class Cmos(ByteDevice):
    """128 bytes of memory behind an index and a data port, the first 14 of them a clock.

    Args:
        memory_below_4g: bytes of RAM up to 4 GiB, for the registers in which a BIOS leaves it.
        memory_above_4g: bytes of RAM from 4 GiB on.
        cpus: number of processors.
        clock: seconds since 1970.
    """

    LENGTH = 2

    def __init__(
        self,
        *,
        memory_below_4g: int = 0,
        memory_above_4g: int = 0,
        cpus: int = 1,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__()
        self._clock = clock
        self._offset = 0.0
        self._index = 0
        self._memory = bytearray(128)
        self._memory[A] = 0x26  # 32,768 Hz crystal, 1024 Hz periodic rate: as a BIOS leaves it
        self._memory[B] = B_24_HOURS
        below_1m = min(memory_below_4g, 640 * KIB)
        above_1m = max(memory_below_4g - MIB, 0)
        above_16m = max(memory_below_4g - 16 * MIB, 0)
        self._store(0x15, below_1m // KIB, 2)
        self._store(0x17, min(above_1m // KIB, 0xFFFF), 2)
        self._store(0x30, min(above_1m // KIB, 0xFFFF), 2)
        self._store(0x34, min(above_16m // (64 * KIB), 0xFFFF), 2)
        self._store(0x5B, min(memory_above_4g // (64 * KIB), 0xFFFFFF), 3)
        self._memory[0x5F] = min(cpus - 1, 255)

    def _store(self, at: int, value: int, size: int) -> None:
        self._memory[at : at + size] = value.to_bytes(size, "little")

    # ---- ports ---------------------------------------------------------------------------------

    def read(self, offset: int) -> int:
        """The index port is for writing only; the data port reads what it points at."""
        if offset == 0:
            return 0xFF
        if self._index in _CLOCK and not self._memory[B] & B_SET:
            return self._fields(self._now())[self._index]
        if self._index == A:
            updating = not self._memory[B] & B_SET and self._now() % 1 >= 1 - _UPDATE
            return self._memory[A] | (A_UPDATING if updating else 0)
        if self._index == C:
            return 0
        if self._index == D:
            return D_VALID
        return self._memory[self._index]

    def write(self, offset: int, value: int) -> None:
        """Set the index (bit 7 masks NMIs, of which there are none), or what it points at."""
        if offset == 0:
            self._index = value & 0x7F
        elif self._index == A:
            self._memory[A] = value & ~A_UPDATING
        elif self._index == B:
            self._set_mode(value)
        elif self._index in _CLOCK and not self._memory[B] & B_SET:
            pass  # it would be overwritten within a second: a clock is set with B_SET
        else:
            self._memory[self._index] = value

    # ---- the clock -----------------------------------------------------------------------------

    def _now(self) -> float:
        return self._clock() + self._offset

    def _set_mode(self, mode: int) -> None:
        """Stop the clock, to be set, or start it from what was set."""
        was = self._memory[B]
        if mode & B_SET and not was & B_SET:
            for register, value in self._fields(self._now()).items():
                self._memory[register] = value
        self._memory[B] = mode
        if was & B_SET and not mode & B_SET:
            self._start()

    def _fields(self, seconds: float) -> dict[int, int]:
        """The registers that show a time."""
        t = time.gmtime(seconds)
        mode = self._memory[B]
        hours = t.tm_hour if mode & B_24_HOURS else t.tm_hour % 12 or 12
        fields = {
            SECONDS: t.tm_sec,
            MINUTES: t.tm_min,
            HOURS: hours,
            WEEKDAY: (t.tm_wday + 1) % 7 + 1,  # Sunday is 1
            DAY: t.tm_mday,
            MONTH: t.tm_mon,
            YEAR: t.tm_year % 100,
            CENTURY: t.tm_year // 100,
        }
        if not mode & B_BINARY:
            fields = {register: value // 10 << 4 | value % 10 for register, value in fields.items()}
        if not mode & B_24_HOURS and t.tm_hour >= 12:
            fields[HOURS] |= PM
        return fields

    def _start(self) -> None:
        """Run on from the time that the registers show; from where it was, if that is none."""
        from datetime import UTC, datetime

        mode = self._memory[B]
        fields = {register: self._memory[register] for register in _CLOCK}
        afternoon = not mode & B_24_HOURS and fields[HOURS] & PM
        if afternoon:
            fields[HOURS] ^= PM
        if not mode & B_BINARY:
            fields = {r: (value >> 4) * 10 + (value & 0xF) for r, value in fields.items()}
        hours = fields[HOURS]
        if not mode & B_24_HOURS:
            hours = hours % 12 + (12 if afternoon else 0)
        try:
            then = datetime(
                fields[CENTURY] * 100 + fields[YEAR],
                fields[MONTH], fields[DAY], hours, fields[MINUTES], fields[SECONDS],
                tzinfo=UTC,
            )  # fmt: skip
        except ValueError:
            return
        self._offset = then.timestamp() - self._clock()

    # ---- state ---------------------------------------------------------------------------------

    def state(self) -> State:
        """Index, memory, and how far the clock was set from the host's."""
        return {"index": self._index, "memory": list(self._memory), "offset": self._offset}

    def restore(self, state: State) -> None:
        """Take over what :meth:`state` returned; the clock shows the time of now."""
        self._index = state["index"]
        self._memory[:] = bytes(state["memory"])
        self._offset = state["offset"]
