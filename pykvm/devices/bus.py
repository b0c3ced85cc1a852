"""The bus: who serves which ports and guest-physical addresses.

A :class:`Bus` is one address space, ``m.pio`` or ``m.mmio``. A claim takes a range of it, served
by an action in C, which costs no Python, or by a Python handler. The C loop reads a sorted table
(``csrc/bus.c``); the table never changes, a new one is published in its place.
"""

from __future__ import annotations

import os
from _thread import RLock

from pykvm._abi import ffi, lib
from pykvm.devices import KEEP_BYTES
from pykvm.devices.claim import Claim, free_slot, release_slot, take_slot
from pykvm.errors import BusOverlapError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.devices.claim import Handler
    from pykvm.devices.in_c import PciPorts
    from pykvm.devices.ring import Fifo, Log
    from pykvm.devices.serial import Serial
    from pykvm.devices.virtio.blk_fast import FastPath

    DoorbellFn = Callable[[Claim, int, int | None, bool], bool]

RETIRED_MOST = 32
"""So much may wait for vCPUs to let go of it before they are asked to; their heartbeat would be
enough, but for a guest that never stops changing claims."""


class Bus:
    """One address space. Claims may come and go while the guest runs.

    Args:
        name: ``"pio"`` or ``"mmio"``.
        slots: the machine's table of Python handlers, shared by both buses.
        doorbell: asks KVM for an ioeventfd: ``(claim, size, datamatch, on) -> done``; None without
            KVM.
        lock: held while claims change; shared by the buses that share ``slots``.
    """

    def __init__(
        self,
        name: str,
        slots: list[Handler],
        doorbell: DoorbellFn | None = None,
        lock: RLock | None = None,
    ) -> None:
        if name not in ("pio", "mmio"):
            raise ValueError(f'a bus is "pio" or "mmio", not {name!r}')
        self.name = name
        self._limit = 0x10000 if name == "pio" else 1 << 64
        self._slots = slots
        self._doorbell = doorbell
        self._lock = lock or RLock()
        self._claims: list[Claim] = []  # replaced whole: find() reads it without the lock
        self._rest: Claim | None = None
        self._vcpus: list[Any] = []
        self._table: Any = None
        # What a loop may still be using: since when, the table, and the claim that was released.
        self._retired: list[tuple[list[tuple[Any, int]], Any, Claim | None]] = []

    # ---- claiming ------------------------------------------------------------------------------

    def handle(self, first: int, handler: Handler, length: int = 1) -> Claim:
        """Serve ``length`` addresses from ``first`` by a Python handler.

        The handler gets a ``PioAccess`` or ``MmioAccess`` (:mod:`pykvm.devices.access`); what it
        returns answers a read (None answers all ones). An access belongs to the range in which it
        begins.
        """
        if not callable(handler):
            raise TypeError(f"a handler must be callable, not {type(handler).__name__}")
        return self._claim(first, length, lib.PYKVM_PYTHON, lib.PYKVM_PYTHON, handler=handler)

    def ignore(self, first: int, length: int = 1) -> Claim:
        """Writes vanish, reads answer all ones; the claim counts both (:attr:`Claim.hits`)."""
        return self._claim(first, length, lib.PYKVM_IGNORE, lib.PYKVM_IGNORE)

    count = ignore

    def constant(self, first: int, value: int, length: int = 1) -> Claim:
        """Reads answer ``value`` (its low bytes, little endian), writes vanish."""
        return self._claim(first, length, lib.PYKVM_CONSTANT, lib.PYKVM_IGNORE, value)

    def log(
        self,
        first: int,
        length: int = 1,
        *,
        value: int = 0,
        capacity: int = 4096,
        sink: Callable[[Any], object] | None = None,
        keep: int = KEEP_BYTES,
    ) -> Log:
        """Write every access down as a record; reads answer ``value``.

        Returns:
            The :class:`~pykvm.devices.ring.Log`; ``read()`` it, or give a ``sink``, which is called
            with batches of records.
        """
        from pykvm.devices.ring import Log

        log = Log(capacity=capacity, sink=sink, keep=keep)
        self._claim(first, length, lib.PYKVM_LOG, lib.PYKVM_LOG, value, device=log)
        return log

    def fifo(
        self,
        first: int,
        *,
        empty: int = 0,
        capacity: int = 4096,
        sink: Callable[[bytes], object] | None = None,
        keep: int = KEEP_BYTES,
    ) -> Fifo:
        """A data register: written bytes are kept for Python, reads take what Python queued.

        Args:
            first: the port or address.
            empty: what a read answers when nothing is queued.
            capacity: size of each ring in bytes, a power of two.
            sink: is called with batches of bytes instead of keeping them for ``read()``.
            keep: how many unread bytes are kept before the run ends in a RingFullError.
        """
        from pykvm.devices.ring import Fifo

        fifo = Fifo(capacity=capacity, sink=sink, keep=keep)
        self._claim(first, 1, lib.PYKVM_FIFO, lib.PYKVM_FIFO, empty, device=fifo)
        return fifo

    def stop(
        self, first: int, length: int = 1, *, tag: str = "stopped", value: int | None = None
    ) -> Claim:
        """A write ends the run with reason ``tag`` and the written value as its code.

        Reads answer ``value``, or all ones.
        """
        on_read = lib.PYKVM_IGNORE if value is None else lib.PYKVM_CONSTANT
        return self._claim(first, length, on_read, lib.PYKVM_STOP, value or 0, tag=tag)

    def clock(self, first: int, hz: int, length: int = 4) -> Claim:
        """Reads answer a ``Clock`` that ticks ``hz`` times a second, its low ``length`` bytes.

        An access at an offset reads the bytes from there on. Writes vanish.
        """
        if not 1 <= length <= 8:
            raise ValueError(f"a clock is 1..8 bytes wide, not {length}")
        from pykvm.devices.in_c import Clock

        return self._claim(first, length, lib.PYKVM_CLOCK, lib.PYKVM_CLOCK, device=Clock(hz))

    def latch(self, first: int) -> Claim:
        """A ``Latch`` (``claim.device``) of two 32-bit registers: one reads its bits, the next
        clears those that are written as ones. Other widths and offsets read zero.
        """
        from pykvm.devices.in_c import Latch

        return self._claim(first, 8, lib.PYKVM_LATCH, lib.PYKVM_LATCH, device=Latch())

    def pci(self, first: int, ports: PciPorts, handler: Handler) -> tuple[Claim, Claim]:
        """PCI's configuration ports: the address register, one port, and data, from the 4th on.

        The handler gets what is written to the data register, and reads of ``live`` bytes.
        """
        address = lib.PYKVM_PCI_ADDRESS
        return (
            self._claim(first, 1, address, address, device=ports),
            self._claim(
                first + 4, 4, lib.PYKVM_PCI_DATA, lib.PYKVM_PYTHON, device=ports, handler=handler
            ),
        )

    def blk(self, first: int, fast: FastPath, handler: Handler, length: int = 4) -> Claim:
        """The doorbell of a block device: C serves the queue whose number is written.

        The handler gets the writes after which there is something left to do.
        """
        return self._claim(
            first, length, lib.PYKVM_CONSTANT, lib.PYKVM_BLK, device=fast, handler=handler
        )

    def uart(self, first: int, serial: Serial) -> Claim:
        """The eight registers of a 16550A; ``Serial.attach`` calls this."""
        return self._claim(first, 8, lib.PYKVM_UART, lib.PYKVM_UART, device=serial)

    def unclaimed(
        self,
        action: str,
        *,
        sink: Callable[[Any], object] | None = None,
        keep: int = KEEP_BYTES,
    ) -> Claim | None:
        """Say what an access does that no claim serves. What was said before is released.

        Args:
            action: ``"end"`` ends the run with reason "unclaimed", as it is at first; with
                ``"ignore"`` it finds an empty bus: writes vanish, reads answer all ones; ``"log"``
                is the same, and writes it down.
            sink: of a log; is called with batches of records.
            keep: of a log without a sink; how many bytes it keeps until they are read.

        Returns:
            The claim over all such addresses; it counts them, and of a log ``claim.device.read()``
            gives the records. None for ``"end"``.
        """
        if action not in ("end", "ignore", "log"):
            raise ValueError(f'unclaimed accesses "end", "ignore" or "log", not {action!r}')
        with self._lock:
            if self._rest is not None:
                self.release(self._rest)
            if action == "end":
                return None
            last = self._limit - 1
            if action == "ignore":
                rest = Claim(self, 0, last, lib.PYKVM_IGNORE, lib.PYKVM_IGNORE)
            else:
                from pykvm.devices.ring import Log

                log = Log(sink=sink, keep=keep)
                ones = (1 << 64) - 1
                rest = Claim(self, 0, last, lib.PYKVM_LOG, lib.PYKVM_LOG, ones, device=log)
            self._place(rest)
            self._rest = rest
            self._changed()
            return rest

    def eventfd(
        self,
        first: int,
        fd: int,
        *,
        size: int = 0,
        datamatch: int | None = None,
        value: int = 0,
        length: int = 0,
    ) -> Claim:
        """A doorbell: a write adds 1 to the eventfd ``fd``, in the kernel where KVM can.

        Args:
            first: port or address.
            fd: an eventfd, which stays the caller's and may be closed: the claim has a duplicate.
            size: in-kernel match of the width: 1, 2, 4, 8; 0 any (KVM_CAP_IOEVENTFD_ANY_LENGTH).
            datamatch: only this value rings in the kernel; others still ring through C.
            value: what reads answer.
            length: of the range, for accesses that begin further up; default ``size``, or 1.
        """
        own = os.dup(fd)
        try:
            claim = self._claim(
                first, length or max(size, 1), lib.PYKVM_CONSTANT, lib.PYKVM_EVENTFD, value, fd=own
            )
        except BaseException:
            os.close(own)
            raise
        try:
            if self._doorbell is not None and self._doorbell(claim, size, datamatch, True):
                claim.in_kernel.append((size, datamatch))
        except BaseException:
            self.release(claim)
            raise
        return claim

    def _claim(
        self, first: int, length: int, on_read: int, on_write: int, value: int = 0, **rest: Any
    ) -> Claim:
        if not 0 <= first < self._limit or length < 1 or first + length > self._limit:
            raise ValueError(
                f"{self.name} range {first:#x}, {length} long, is outside 0..{self._limit - 1:#x}"
            )
        if not 0 <= value < 1 << 64:
            raise ValueError(f"value {value:#x} does not fit 64 bits")
        claim = Claim(self, first, first + length - 1, on_read, on_write, value, **rest)
        with self._lock:
            claims = self._claims
            at = _position(claims, first) if claims else 0
            for other in claims[at - 1 if at else 0 : at + 1]:
                if other.first <= claim.last and claim.first <= other.last:
                    raise BusOverlapError(f"{claim!r} overlaps {other!r}: release() that first")
            self._place(claim)
            self._claims = [*claims[:at], claim, *claims[at:]]
            self._changed()
        return claim

    def _place(self, claim: Claim) -> None:
        if self._retired:
            self._let_go()
        claim.place(take_slot(self._slots, claim.handler))

    def release(self, claim: Claim) -> None:
        """Give a range back. Idempotent."""
        with self._lock:
            if claim is self._rest:
                self._rest = None
            elif claim in self._claims:
                self._claims = [other for other in self._claims if other is not claim]
            else:
                return
            for size, datamatch in claim.in_kernel:
                assert self._doorbell is not None
                self._doorbell(claim, size, datamatch, False)
            claim.in_kernel.clear()
            release_slot(self._slots, claim.slot)
            self._changed(claim)

    # ---- looking up ----------------------------------------------------------------------------

    def find(self, address: int) -> Claim | None:
        """The claim that serves an address, or None."""
        claims = self._claims
        at = _position(claims, address + 1) - 1
        if at >= 0 and claims[at].first <= address <= claims[at].last:
            return claims[at]
        return self._rest

    def __iter__(self) -> Any:
        return iter(tuple(self._claims))

    @property
    def rest(self) -> Claim | None:
        """The claim over all that is unclaimed, see :meth:`unclaimed`."""
        return self._rest

    def claims(self) -> tuple[Claim, ...]:
        """Every claim by address, and last the one over what is unclaimed, if there is one."""
        return (*self._claims, self._rest) if self._rest else tuple(self._claims)

    def __len__(self) -> int:
        return len(self._claims)

    def __repr__(self) -> str:
        return "\n".join([f"<Bus {self.name}: {len(self)} claims>", *map(repr, self._claims)])

    def drain(self) -> None:
        """Empty every ring into its Python end; over the limit, what is in the ring waits there."""
        for claim in self.claims():
            if claim.device is not None and claim.drains:
                claim.device.drain(at_end=True)

    def close(self) -> None:
        """Release every claim. No vCPU may use this bus any more."""
        for vcpu in self._vcpus:
            setattr(vcpu, self.name, ffi.NULL)
        self._vcpus.clear()
        for claim in self.claims():
            claim.in_kernel.clear()  # they go with the VM's fd
            self.release(claim)
        self._changed()

    # ---- the table for C -----------------------------------------------------------------------

    def attach(self, vcpu: Any) -> None:
        """Let a ``struct pykvm_vcpu`` use this bus from now on."""
        self._vcpus.append(vcpu)
        if self._table is None and (self._claims or self._rest):  # without one nothing is claimed
            self._table = self._build()
        if self._table is not None:
            setattr(vcpu, self.name, self._table[0])

    def _changed(self, released: Claim | None = None) -> None:
        before, self._table = self._table, self._build() if self._vcpus else None
        for vcpu in self._vcpus:
            setattr(vcpu, self.name, self._table[0])
        # Asked last: a loop that begins from here on uses the new table.
        since = [(vcpu, vcpu.entries) for vcpu in self._vcpus if vcpu.tid]
        if since or released is not None or self._retired:
            self._retired.append((since, before, released))
            self._let_go()

    def _let_go(self) -> None:
        """Free what was retired before every vCPU ended its run or entered the guest anew.

        Until then its loop may hold the table, a descriptor out of it, or the number of a slot.
        """
        waiting, self._retired = self._retired, []
        for since, table, claim in waiting:
            if any(vcpu.tid and vcpu.entries == entries for vcpu, entries in since):
                self._retired.append((since, table, claim))
            elif claim is not None:
                free_slot(self._slots, claim.slot)
                claim.forget()
        if len(self._retired) > RETIRED_MOST:
            # A guest that moves its devices about must not fill the host, nor take its descriptors,
            # while another vCPU of it sleeps.
            for vcpu in self._vcpus:
                lib.pykvm_vcpu_nudge(vcpu)

    def _build(self) -> Any:
        claims = self.claims()
        ranges = ffi.new("struct pykvm_range *[]", [claim.c for claim in claims])
        table = ffi.new("struct pykvm_table *")
        table.count = len(self._claims)
        table.ranges = ranges
        if self._rest is not None:
            table.rest = self._rest.c
        return table, ranges, claims  # the claims keep ranges, rings and devices alive


def _position(claims: list[Claim], first: int) -> int:
    """Where in the sorted claims one that begins at ``first`` belongs."""
    low, high = 0, len(claims)
    while low < high:
        middle = (low + high) // 2
        if claims[middle].first < first:
            low = middle + 1
        else:
            high = middle
    return low
