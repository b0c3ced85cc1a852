"""A split virtqueue: chains of buffers from a driver, checked in C (``csrc/vring.c``), and back.

Whatever the driver wrote, a chain that :meth:`Queue.pop` returns is whole, lies in guest RAM and
has its readable buffers first; the rest is a :class:`~pykvm.errors.GuestError`. What the buffers
hold may still change at any moment: who parses copies first (:meth:`Chain.read`).

Numbers in brackets are clauses of virtio 1.2.
"""

from __future__ import annotations

from struct import Struct
from time import perf_counter_ns

from pykvm._abi import ffi, lib
from pykvm.errors import GuestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.memory import GuestMemory

MAX_SIZE = 32768
"""The most entries of a split virtqueue (2.7)."""
MAX_PIECES = 1024
"""The most pieces of guest memory in a chain, beyond the queue's size."""

PARTS = {"desc": lib.PYKVM_DESC, "driver": lib.PYKVM_DRIVER, "device": lib.PYKVM_DEVICE}
"""The parts of a queue: descriptor, driver and device area (2.6)."""

BREACHES = {
    lib.PYKVM_BREACH_SIZE: "the queue's size is no power of two, or too large (2.7)",
    lib.PYKVM_BREACH_ALIGN: "a part of the ring is not aligned (2.7)",
    lib.PYKVM_BREACH_RING: "a part of the ring is not in RAM",
    lib.PYKVM_BREACH_INDEX: "more was made available than the ring has entries (2.7.6)",
    lib.PYKVM_BREACH_FLIGHT: "descriptors were made available that are in use (2.7.13)",
    lib.PYKVM_BREACH_HEAD: "a chain begins outside the descriptor table (2.7.6)",
    lib.PYKVM_BREACH_NEXT: "a chain goes on outside its table (2.7.5)",
    lib.PYKVM_BREACH_LOOP: "a chain has more descriptors than its table: a loop (2.7.5.2)",
    lib.PYKVM_BREACH_BUFFER: "a buffer is not in RAM, or is to be written and is in ROM",
    lib.PYKVM_BREACH_ORDER: "a device-readable buffer follows a device-writable one (2.7.4.2)",
    lib.PYKVM_BREACH_TOTAL: "a chain has more than 2**32 bytes (2.7.5.2)",
    lib.PYKVM_BREACH_INDIRECT: "an indirect table where none may be (2.7.5.3.1)",
    lib.PYKVM_BREACH_TABLE: "an indirect table of a wrong length, or not in RAM (2.7.5.3)",
    lib.PYKVM_BREACH_LONG: "a chain has more pieces than this device takes (2.7.4.1)",
}
"""What a driver did wrong, in words."""

_SEGMENT = Struct("=QIHH")  # struct pykvm_segment


class Chain:
    """One chain of buffers; slices of guest memory, without a copy.

    Attributes:
        head: the descriptor that it begins with.
        readable: what the driver sends, in order. No view is empty, each lies in one region.
        writable: where the answer goes, in order.
        read_bytes, write_bytes: their sums.
        began: ``time.perf_counter_ns()`` when it was popped.
        generation: of the queue; a chain of an earlier one is stale.
    """

    __slots__ = (
        "began",
        "generation",
        "head",
        "read_bytes",
        "readable",
        "writable",
        "write_bytes",
    )

    def __init__(self, head: int, generation: int) -> None:
        self.head = head
        self.generation = generation
        self.readable: list[memoryview] = []
        self.writable: list[memoryview] = []
        self.read_bytes = 0
        self.write_bytes = 0
        self.began = 0

    def read(self, limit: int | None = None) -> bytes:
        """Return a copy of what the driver sends, or of its first ``limit`` bytes.

        Parse this, and never a view twice: the guest may change it in between.
        """
        if limit is None or self.read_bytes <= limit:
            return b"".join(self.readable)
        pieces = []
        for view in self.readable:
            piece = view[:limit]
            pieces.append(piece)
            limit -= len(piece)
            if not limit:
                break
        return b"".join(pieces)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Put ``data`` into the writable buffers, as much as there is room for.

        Returns:
            How many bytes; pass it to :meth:`Queue.push`.
        """
        at = 0
        for view in self.writable:
            piece = data[at : at + len(view)]
            view[: len(piece)] = piece
            at += len(piece)
            if at >= len(data):
                break
        return at

    def __repr__(self) -> str:
        return f"<Chain {self.head}: {self.read_bytes} bytes to read, {self.write_bytes} to write>"


class Queue:
    """One virtqueue of a device. The core makes them; devices use pop, push, should_interrupt.

    Pops come from one thread at a time, pushes from any and in any order.

    Args:
        index: its number in the device.
        max_size: the most entries it offers, a power of two.
        memory: guest memory.
        lib_: the compiled module; the tests of the tests hand in one with bugs.

    Attributes:
        size: entries, as the driver chose.
        c: the ``struct pykvm_vring``.
    """

    def __init__(self, index: int, max_size: int, memory: GuestMemory, lib_: Any = lib) -> None:
        if not 1 <= max_size <= MAX_SIZE or max_size & (max_size - 1):
            raise ValueError(f"a queue has 1..{MAX_SIZE} entries, a power of two, not {max_size}")
        self.index = index
        self.max_size = max_size
        self.size = max_size
        self._lib = lib_
        self._table = memory.table()
        self.c = ffi.new("struct pykvm_vring *", {"ram": self._table.c})
        capacity = max_size + MAX_PIECES
        self._segments = ffi.new("struct pykvm_segment[]", capacity)
        self._bytes = ffi.buffer(self._segments)
        self._chain = ffi.new(
            "struct pykvm_chain *", {"segments": self._segments, "capacity": capacity}
        )

    # ---- set up by the driver ------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether the driver has enabled it."""
        return bool(self.c.enabled)

    @property
    def in_flight(self) -> int:
        """Chains that were popped and not pushed yet."""
        return int(self.c.in_flight)

    def address(self, part: str) -> int:
        """The guest-physical address of a part: ``"desc"``, ``"driver"`` or ``"device"``."""
        return int(self.c.part[PARTS[part]].gpa)

    def set_address(self, part: str, gpa: int) -> None:
        """Set the address of a part; a queue in use stays where it is."""
        if not self.c.enabled:
            self.c.part[PARTS[part]].gpa = gpa

    def set_size(self, size: int) -> None:
        """Set the number of entries; checked by :meth:`enable`."""
        if not self.c.enabled:
            self.size = size

    def enable(self, *, event_idx: bool = False, indirect: bool = False) -> None:
        """Check the ring and begin to use it.

        Raises:
            GuestError: its size, alignment, or where it lies.
        """
        if self.c.enabled:
            return
        if not 0 < self.size <= self.max_size:
            raise self.breach(lib.PYKVM_BREACH_SIZE)
        self.c.size = self.size
        self.c.event_idx = event_idx
        self.c.indirect = indirect
        error = self._lib.pykvm_vring_enable(self.c)
        if error:
            raise self.breach(error)
        self._table.expose(self.address("device"), 6 + 8 * self.size)  # the used ring (2.7.8)

    def disable(self) -> None:
        """Use it no more. What is in flight is stale: pushes of it do nothing."""
        self._lib.pykvm_vring_disable(self.c)

    def reset(self) -> None:
        """Back to how it was made."""
        self.disable()
        self.size = self.max_size
        for part in PARTS.values():
            self.c.part[part].gpa = 0

    def breach(self, error: int) -> GuestError:
        """What C found the driver to have done, an ``enum pykvm_breach``, as an error."""
        return GuestError(f"queue {self.index}: {BREACHES[error]}")

    # ---- service -------------------------------------------------------------------------------

    def pop(self) -> Chain | None:
        """Take the next chain. None: there is none, and the driver will notify of the next.

        Raises:
            GuestError: the driver broke the protocol; nothing was taken.
        """
        result = self._lib.pykvm_vring_pop(self.c, self._chain)
        if result <= 0:
            if result:
                raise self.breach(result)
            return None
        return self.taken()

    def taken(self) -> Chain:
        """The chain in ``_chain``, which C has popped."""
        found = self._chain
        chain = Chain(found.head, found.generation)
        chain.read_bytes = found.read_bytes
        chain.write_bytes = found.write_bytes
        views = self._table.views
        segments = _SEGMENT.iter_unpack(self._bytes[: found.count * _SEGMENT.size])
        for at, length, region, writable in segments:
            view = views[region][at : at + length]
            (chain.writable if writable else chain.readable).append(view)
        chain.began = perf_counter_ns()
        return chain

    def push(self, chain: Chain, written: int = 0) -> bool:
        """Give a chain back, with so many bytes written into it.

        Returns:
            False if the queue was reset since it was popped: nothing was done.
        """
        return not self._lib.pykvm_vring_push(self.c, chain.generation, chain.head, written)

    def should_interrupt(self) -> bool:
        """Whether the driver wants an interrupt for what was pushed since this was asked last."""
        return bool(self._lib.pykvm_vring_should_interrupt(self.c))

    def has_work(self) -> bool:
        """Whether chains wait. If not, the driver will notify of the next."""
        return bool(self._lib.pykvm_vring_waiting(self.c))

    # ---- life ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the driver set up and how far it is served, as plain data; nothing is in flight."""
        if self.in_flight:
            raise ValueError(f"queue {self.index} has {self.in_flight} chains in flight: drain it")
        c = self.c
        state: dict[str, Any] = {part: self.address(part) for part in PARTS}
        state |= {"size": self.size, "ready": self.ready}
        if self.ready:
            state |= {name: int(getattr(c, name)) for name in _COUNTERS}
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned.

        Raises:
            GuestError: the ring is not in this memory.
        """
        self.reset()
        self.size = state["size"]
        for part in PARTS:
            self.set_address(part, state[part])
        if state["ready"]:
            self.enable(event_idx=bool(state["event_idx"]), indirect=bool(state["indirect"]))
            for name in _COUNTERS:
                setattr(self.c, name, state[name])

    def __repr__(self) -> str:
        state = f"{self.in_flight} in flight" if self.ready else "not ready"
        return f"<Queue {self.index}, {self.size} entries, {state}>"


_COUNTERS = (
    "next_avail", "avail_seen", "used", "signalled", "signalled_valid", "event_idx", "indirect",
    "quiet",
)  # fmt: skip
