"""Claims: who serves a range of a bus, as C reads it, and the slots by which C names handlers."""

from __future__ import annotations

import os

from pykvm._abi import ffi, lib
from pykvm.errors import BusOverlapError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.devices.access import Access
    from pykvm.devices.bus import Bus

    Handler = Callable[[Any], int | None]

_ACTION_NAMES = {
    lib.PYKVM_PYTHON: "python",
    lib.PYKVM_IGNORE: "ignore",
    lib.PYKVM_CONSTANT: "constant",
    lib.PYKVM_LOG: "log",
    lib.PYKVM_FIFO: "fifo",
    lib.PYKVM_EVENTFD: "eventfd",
    lib.PYKVM_STOP: "stop",
    lib.PYKVM_UART: "uart",
    lib.PYKVM_CLOCK: "clock",
    lib.PYKVM_LATCH: "latch",
    lib.PYKVM_PCI_ADDRESS: "pci",
    lib.PYKVM_PCI_DATA: "pci",
    lib.PYKVM_BLK: "blk",
}

_IN_DEVICE = (
    lib.PYKVM_UART, lib.PYKVM_CLOCK, lib.PYKVM_LATCH, lib.PYKVM_PCI_ADDRESS, lib.PYKVM_PCI_DATA,
)  # fmt: skip
"""Actions whose state is a C structure of the device's."""


class Claim:
    """A claimed range: first and last address inclusive, and what serves it.

    Attributes:
        bus: the bus it is on.
        first, last: ports or guest-physical addresses.
        on_read, on_write: the actions, ``PYKVM_*`` of ``enum pykvm_action``.
        value: what reads answer where the action does not say.
        handler: the Python handler, or None.
        device: the ``Fifo``, ``Log``, ``Serial``, ``Clock``, ``Latch`` or ``PciPorts`` behind it,
            or None.
        c: the ``struct pykvm_range``, once it is on the bus.
        fd: of an eventfd claim a duplicate of the eventfd, which is closed on release; else -1.
    """

    __slots__ = (
        "bus", "c", "device", "fd", "first", "handler", "in_kernel", "last", "on_read",
        "on_write", "slot", "tag", "value",
    )  # fmt: skip

    def __init__(
        self,
        bus: Bus,
        first: int,
        last: int,
        on_read: int,
        on_write: int,
        value: int = 0,
        handler: Handler | None = None,
        device: Any = None,
        tag: str = "",
        fd: int = -1,
    ) -> None:
        self.bus = bus
        self.first = first
        self.last = last
        self.on_read = on_read
        self.on_write = on_write
        self.value = value
        self.handler = handler
        self.device = device
        self.fd = fd
        self.tag = tag
        self.slot = 0
        self.in_kernel: list[tuple[int, int | None]] = []
        self.c: Any = None

    @property
    def drains(self) -> bool:
        """Whether a ring lies between C and its device, which ``device.drain()`` empties."""
        return hasattr(self.device, "drain")

    @property
    def hits(self) -> int:
        """Accesses so far. Those that an in-kernel ioeventfd took do not reach us to be counted."""
        return 0 if self.c is None else int(self.c.hits)

    def place(self, slot: int) -> None:
        """Take a slot, and make the range for C."""
        self.slot = slot
        self.c = c = ffi.new("struct pykvm_range *")
        c.first, c.last, c.value = self.first, self.last, self.value
        c.on_read, c.on_write, c.slot, c.fd = self.on_read, self.on_write, slot, self.fd
        actions = (self.on_read, self.on_write)
        if lib.PYKVM_LOG in actions or lib.PYKVM_FIFO in actions:
            c.out = self.device.output.c
        if lib.PYKVM_FIFO in actions:
            setattr(c, "in", self.device.input.c)
        elif self.on_read in _IN_DEVICE or self.on_write == lib.PYKVM_BLK:
            c.device = self.device.c

    def release(self) -> None:
        """Give the range back; its eventfds are closed. Idempotent."""
        self.bus.release(self)

    def forget(self) -> None:
        """Close what it opened; nobody serves it any more."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        if self.on_write in (lib.PYKVM_FIFO, lib.PYKVM_LOG):  # made for this claim alone
            self.device.close()

    def __repr__(self) -> str:
        names = {self.on_read: "", self.on_write: ""}
        actions = "/".join(_ACTION_NAMES[a] for a in names)
        return f"<{self.bus.name} {self.first:#x}..{self.last:#x} {actions}, {self.hits} hits>"


def take_slot(slots: list[Handler], handler: Handler | None) -> int:
    """Put a claim's handler into the table of them: every claim has a slot, C names it by that.

    The slot of a claim just released is taken only for want of others: an access to it may be on
    its way.
    """
    full = len(slots) >= lib.PYKVM_SLOTS
    for number, taken in enumerate(slots):
        if taken is _free or (full and taken is _released):
            slots[number] = handler or _no_handler
            return number
    if full:
        raise BusOverlapError(f"a machine has at most {lib.PYKVM_SLOTS} claims")
    slots.append(handler or _no_handler)
    return len(slots) - 1


def release_slot(slots: list[Handler], number: int) -> None:
    """Its claim is gone, but a vCPU may still be about to name it."""
    slots[number] = _released


def free_slot(slots: list[Handler], number: int) -> None:
    """No vCPU can name it any more, unless it was taken again meanwhile."""
    if slots[number] is _released:
        slots[number] = _free


def _no_handler(access: Access) -> int | None:
    """Stand in for the handler of a claim that has none."""
    return None


def _free(access: Access) -> int | None:
    """Mark a slot that belongs to no claim."""
    return None


def _released(access: Access) -> int | None:
    """Mark the slot of a claim that was released. A late access finds an empty bus."""
    return None
