"""Rings between the C loop and Python: what LOG and FIFO ranges fill without Python.

A full ring returns to Python, which drains it here and lets the access go on: nothing is dropped.
What was drained waits in host memory up to a limit, so that a guest cannot fill the host.
"""

from __future__ import annotations

import os
from _thread import RLock

from pykvm._abi import ffi, lib
from pykvm.devices import KEEP_BYTES
from pykvm.errors import PykvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, overload


RECORD_BYTES: int = ffi.sizeof("struct pykvm_record")


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
            self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self.c.eventfd = self._eventfd
            if len(self):  # looked at last: what comes from here on signals itself
                self.wake()
        return self._eventfd

    def wake(self) -> None:
        """Make the eventfd readable, if there is one."""
        if self._eventfd >= 0:
            os.eventfd_write(self._eventfd, 1)

    def close(self) -> None:
        """Give the eventfd back; what is in the ring can still be popped."""
        if self._eventfd >= 0:
            self.c.eventfd = -1
            os.close(self._eventfd)
            self._eventfd = -1

    def pop(self, quiet: bool = True) -> Any:
        """All items there are, as a C array that lasts until the next pop, and their number.

        Args:
            quiet: the eventfd is readable no more. Else it stays as it is, for a reader who is
                still to come for the items.
        """
        if quiet and self._eventfd >= 0:
            try:  # noqa: SIM105  before popping: a push in between signals anew
                os.eventfd_read(self._eventfd)
            except BlockingIOError:
                pass
        return self._batch, lib.pykvm_ring_pop(self.c, self._batch, self._capacity)


class RingDevice:
    """What stands behind a range that fills a ring: the ring, and what was taken out of it.

    The vCPU's thread and readers in other threads use it at once: all under one lock, which is
    held while the sink is called, so that batches reach it in order.
    """

    def __init__(
        self, item_type: str, capacity: int, sink: Callable[[Any], object] | None, keep: int
    ) -> None:
        self.output = Ring(item_type, capacity)
        self.sink = sink
        self._keep = keep
        self._kept = bytearray()
        self._lock = RLock()

    def drain(self, at_end: bool = False) -> None:
        """Take what is in the ring; the run loop calls this when it is full and at a run's end.

        Args:
            at_end: the ring has room: over the limit, leave in it what is there.

        Raises:
            RingFullError: more than ``keep`` bytes wait to be read. They are still there.
        """
        with self._lock:
            if self.sink is None:
                if len(self._kept) < self._keep:
                    self._kept += self._pop(quiet=False)
                elif not at_end:
                    raise RingFullError(
                        f"the guest has written {len(self._kept)} bytes that nobody read:"
                        f" read() them, or give the {type(self).__name__} a sink"
                    )
            elif data := self._pop():
                self.sink(self._batch(data))

    def _pop(self, quiet: bool = True) -> bytes:
        items, count = self.output.pop(quiet)
        return bytes(ffi.buffer(items, count * self.output.c.item_size))

    def _batch(self, data: bytes) -> Any:
        return data

    def _take(self) -> bytes:
        with self._lock:
            data = self._pop()
            if self._kept:
                data = bytes(self._kept) + data
                self._kept.clear()
            return data

    def state(self) -> dict[str, Any]:
        """What was written and not read yet; with a sink that is nothing."""
        with self._lock:
            if self.sink is None:
                self._kept += self._pop(quiet=False)
            else:
                self.drain()
            return {"output": bytes(self._kept).hex()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        with self._lock:
            self._pop(quiet=False)
            self._kept[:] = bytes.fromhex(state["output"])

    def fileno(self) -> int:
        """An eventfd for select(): readable while there is something to read."""
        with self._lock:
            made = self.output.fileno()
            if self._kept:
                self.output.wake()
            return made

    def close(self) -> None:
        """Release the eventfd; what was not read yet can still be read."""
        self.output.close()


class Fifo(RingDevice):
    """The Python end of a FIFO range: a UART's data register, a console port.

    What the guest writes is read with :meth:`read`, from any thread; with a ``sink`` it is handed
    on in batches instead, whenever the ring fills and when a run ends.
    """

    def __init__(
        self,
        *,
        capacity: int = 4096,
        sink: Callable[[bytes], object] | None = None,
        keep: int = KEEP_BYTES,
    ) -> None:
        super().__init__("uint8_t", capacity, sink, keep)
        self.input = Ring("uint8_t", capacity)
        self._waiting = bytearray()

    def drain(self, at_end: bool = False) -> None:
        """As for any output; and let the guest have more of what :meth:`write` queued."""
        with self._lock:
            self._feed()
            super().drain(at_end)

    def read(self) -> bytes:
        """Everything that the guest has written and that was not read yet."""
        return self._take()

    def write(self, data: bytes) -> None:
        """Queue bytes for the guest to read; any amount, at any time."""
        with self._lock:
            self._waiting += data
            self._feed()

    def state(self) -> dict[str, Any]:
        """As for any output, and the input that the guest has not read yet."""
        with self._lock:
            items, count = self.input.pop()
            waiting = bytes(ffi.buffer(items, count)) + bytes(self._waiting)
            self._waiting[:] = waiting
            self._feed()
            return {**super().state(), "input": waiting.hex()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        with self._lock:
            super().restore(state)
            self.input.pop()
            self._waiting[:] = bytes.fromhex(state["input"])
            self._feed()

    def _feed(self) -> None:
        room = self.input.c.capacity - len(self.input)
        piece = bytes(self._waiting[:room])
        if piece and lib.pykvm_ring_push(self.input.c, ffi.from_buffer(piece), len(piece)) == 0:
            del self._waiting[: len(piece)]
        self.input.c.more = bool(self._waiting)

    def close(self) -> None:
        """Release the eventfds; what was not read yet can still be read."""
        super().close()
        self.input.close()


class Records:
    """A batch of records, decoded one by one as they are looked at; a sequence."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data) // RECORD_BYTES

    if TYPE_CHECKING:

        @overload
        def __getitem__(self, at: int) -> Record: ...

        @overload
        def __getitem__(self, at: slice) -> list[Record]: ...

    def __getitem__(self, at: int | slice) -> Record | list[Record]:
        numbers = range(len(self))[at]
        if isinstance(numbers, range):
            return [self._decode(number) for number in numbers]
        return self._decode(numbers)

    def __iter__(self) -> Iterator[Record]:
        return map(self._decode, range(len(self)))

    def _decode(self, number: int) -> Record:
        r = ffi.from_buffer("struct pykvm_record *", self._data)[number]
        return Record(r.address, r.value, r.size, bool(r.is_write), r.vcpu, r.exit)

    def __repr__(self) -> str:
        return f"<{len(self)} records>"


class Log(RingDevice):
    """The Python end of a LOG range: every access as a :class:`Record`."""

    def __init__(
        self,
        *,
        capacity: int = 4096,
        sink: Callable[[Records], object] | None = None,
        keep: int = KEEP_BYTES,
    ) -> None:
        super().__init__("struct pykvm_record", capacity, sink, keep)

    def _batch(self, data: bytes) -> Records:
        return Records(data)

    def read(self) -> Records:
        """Every record that was not read yet, oldest first."""
        return Records(self._take())
