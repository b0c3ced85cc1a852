"""Rings between the C loop and Python: what LOG and FIFO ranges fill without Python.

A full ring returns to Python, which drains it here and lets the access go on: nothing is dropped.
What was drained waits in host memory up to a limit, so that a guest cannot fill the host.
"""

from __future__ import annotations

import os

from pykvm._abi import ffi, lib
from pykvm.errors import PykvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

KEEP_BYTES = 16 << 20
"""Default of how much a FIFO or a log keeps until it is read, in bytes."""


class RingFullError(PykvmError):
    """The guest produced more than the limit and nobody read it."""


class Record:
    """One access as a LOG range wrote it down.

    Attributes:
        address: port or guest-physical address.
        value: what was written, or what the read was answered with.
        size: width in bytes.
        is_write: True for OUT and stores.
        vcpu: index of the vCPU.
        exit: that vCPU's exit count at the time, which orders its records.
    """

    __slots__ = ("address", "exit", "is_write", "size", "value", "vcpu")

    def __init__(
        self, address: int, value: int, size: int, is_write: bool, vcpu: int, exit: int
    ) -> None:
        self.address = address
        self.value = value
        self.size = size
        self.is_write = is_write
        self.vcpu = vcpu
        self.exit = exit

    def __repr__(self) -> str:
        verb = "write" if self.is_write else "read"
        return f"<{verb} {self.address:#x} {self.value:#x} ({self.size}) cpu {self.vcpu}>"


class Ring:
    """A ring of fixed-size items in memory of its own.

    Args:
        item_type: C type of the items.
        capacity: items, a power of two of at least 16.
    """

    def __init__(self, item_type: str, capacity: int) -> None:
        if capacity < 16 or capacity & (capacity - 1):
            raise ValueError(f"capacity must be a power of two of at least 16, not {capacity}")
        self._items = ffi.new(f"{item_type}[]", capacity)
        self._batch = ffi.new(f"{item_type}[]", capacity)
        self._capacity = capacity
        self._eventfd = -1
        self.c = ffi.new("struct pykvm_ring *")
        self.c.items = ffi.cast("uint8_t *", self._items)
        self.c.item_size = ffi.sizeof(item_type)
        self.c.capacity = capacity
        self.c.eventfd = -1

    def __len__(self) -> int:
        return int(self.c.head - self.c.tail)

    def fileno(self) -> int:
        """An eventfd that becomes readable when the ring turns non-empty; made at first use."""
        if self._eventfd < 0:
            self._eventfd = os.eventfd(1 if len(self) else 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self.c.eventfd = self._eventfd
        return self._eventfd

    def close(self) -> None:
        """Give the eventfd back; what is in the ring can still be popped."""
        if self._eventfd >= 0:
            self.c.eventfd = -1
            os.close(self._eventfd)
            self._eventfd = -1

    def pop(self) -> Any:
        """All items there are, as a C array that lasts until the next pop, and their number."""
        if self._eventfd >= 0:
            try:  # before popping: a push in between signals anew
                os.eventfd_read(self._eventfd)
            except BlockingIOError:
                pass
        return self._batch, lib.pykvm_ring_pop(self.c, self._batch, self._capacity)


class Fifo:
    """The Python end of a FIFO range: a UART's data register, a console port.

    What the guest writes is read with :meth:`read`; with a ``sink`` it is handed on in batches
    instead, whenever the ring fills and when a run ends.
    """

    def __init__(
        self,
        *,
        capacity: int = 4096,
        sink: Callable[[bytes], object] | None = None,
        keep: int = KEEP_BYTES,
    ) -> None:
        self.output = Ring("uint8_t", capacity)
        self.input = Ring("uint8_t", capacity)
        self.sink = sink
        self._keep = keep
        self._kept = bytearray()
        self._waiting = bytearray()

    def drain(self) -> None:
        """Take what is in the ring; the run loop calls this when it is full and at a run's end.

        Raises:
            RingFullError: more than ``keep`` bytes wait to be read. They are still there.
        """
        if self.sink is None and len(self._kept) >= self._keep:
            raise RingFullError(
                f"the guest has written {len(self._kept)} bytes that nobody read:"
                " read() them, or give the FIFO a sink"
            )
        items, count = self.output.pop()
        if count:
            if self.sink is None:
                self._kept += ffi.buffer(items, count)
            else:
                self.sink(bytes(ffi.buffer(items, count)))
        self._feed()

    def read(self) -> bytes:
        """Everything that the guest has written and that was not read yet."""
        items, count = self.output.pop()
        data = bytes(self._kept) + bytes(ffi.buffer(items, count))
        self._kept.clear()
        return data

    def write(self, data: bytes) -> None:
        """Queue bytes for the guest to read; any amount, at any time."""
        self._waiting += data
        self._feed()

    def _feed(self) -> None:
        room = self.input.c.capacity - len(self.input)
        piece = bytes(self._waiting[:room])
        if piece and lib.pykvm_ring_push(self.input.c, ffi.from_buffer(piece), len(piece)) == 0:
            del self._waiting[: len(piece)]
        self.input.c.more = bool(self._waiting)

    def fileno(self) -> int:
        """An eventfd for select(): readable when output turns from empty to non-empty."""
        return self.output.fileno()

    def close(self) -> None:
        """Release the eventfds."""
        self.output.close()
        self.input.close()


class Log:
    """The Python end of a LOG range: every access as a :class:`Record`."""

    def __init__(
        self,
        *,
        capacity: int = 4096,
        sink: Callable[[list[Record]], object] | None = None,
        keep: int = KEEP_BYTES,
    ) -> None:
        self.output = Ring("struct pykvm_record", capacity)
        self.sink = sink
        self._keep = keep // ffi.sizeof("struct pykvm_record")
        self._kept: list[Record] = []

    def _pop(self) -> list[Record]:
        items, count = self.output.pop()
        return [
            Record(r.address, r.value, r.size, bool(r.is_write), r.vcpu, r.exit)
            for r in items[0:count]
        ]

    def drain(self) -> None:
        """Take what is in the ring; the run loop calls this when it is full and at a run's end.

        Raises:
            RingFullError: more than ``keep`` bytes of records wait. They are still there.
        """
        if self.sink is None and len(self._kept) >= self._keep:
            raise RingFullError(
                f"{len(self._kept)} records wait that nobody read: read() them, or give the log"
                " a sink"
            )
        records = self._pop()
        if self.sink is None:
            self._kept += records
        elif records:
            self.sink(records)

    def read(self) -> list[Record]:
        """Every record that was not read yet, oldest first."""
        records = self._kept + self._pop()
        self._kept = []
        return records

    def fileno(self) -> int:
        """An eventfd for select(): readable when the log turns from empty to non-empty."""
        return self.output.fileno()

    def close(self) -> None:
        """Release the eventfd."""
        self.output.close()
