"""MSI-X: interrupts of a PCI device as messages (PCI Local Bus Specification 3.0, 6.8.2).

A vector is a message that the guest puts into the table; whoever raises it has KVM send it, without
an exit. One that is masked is remembered in the pending bits, and sent when it is unmasked.
"""

from __future__ import annotations

from _thread import allocate_lock
from struct import pack, pack_into, unpack_from

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    Message = tuple[int, int]
    """Address and data."""

    class Lines(Protocol):
        """How messages get to the guest."""

        def route(self, messages: dict[int, Message | None]) -> None:
            """From now on these vectors send these messages, or None at all."""

        def fire(self, vector: int) -> None:
            """Send a vector's message; from any thread."""

        def eventfd(self, vector: int) -> int:
            """An eventfd that sends a vector's message, or -1."""

        def close(self) -> None:
            """Give the lines back. Idempotent."""


CAPABILITY = 0x11
ENTRY = 16
ENABLE, MASK_ALL = 1 << 15, 1 << 14
"""Bits of the message control word (6.8.2.3)."""
MASKED = 1
"""Of an entry's vector control word (6.8.2.9)."""

_INTERRUPTS = 0xFEE
"""Bits 31:20 of a message's address; others are writes to memory, which nobody makes here."""


class Msix:
    """Table, pending bits and control of a device's MSI-X.

    Args:
        count: vectors, 1..2048.
        lines: sends the messages.

    Attributes:
        count: vectors.
        enabled: the guest has switched it on.
    """

    def __init__(self, count: int, lines: Lines) -> None:
        if not 1 <= count <= 2048:
            raise ValueError(f"MSI-X has 1 to 2048 vectors, not {count}")
        self.count = count
        self.enabled = False
        self._lines = lines
        self._all_masked = False
        self._table = bytearray(pack("<QII", 0, 0, MASKED) * count)
        self._pending = 0
        self._routed: dict[int, Message | None] = {}
        self._lock = allocate_lock()  # interrupts come from any thread

    def capability(self, bar: int, table: int, pending: int) -> tuple[bytes, bytes]:
        """What stands in configuration space after id and link, and which bits are writable."""
        body = pack("<HII", self.count - 1, table | bar, pending | bar)
        return body, pack("<H", ENABLE | MASK_ALL)

    # ---- interrupts ----------------------------------------------------------------------------

    def signal(self, vector: int) -> None:
        """Interrupt the guest, now or when it unmasks the vector; from any thread."""
        with self._lock:
            if self._silent(vector):
                self._pending |= 1 << vector
            else:
                self._lines.fire(vector)

    def eventfd(self, vector: int) -> int:
        """What C writes to send a vector's message now; -1 while that is for :meth:`signal`."""
        with self._lock:
            return -1 if self._silent(vector) else self._lines.eventfd(vector)

    def _silent(self, vector: int) -> bool:
        masked = self._table[ENTRY * vector + 12] & MASKED
        return bool(masked or self._all_masked or not self.enabled)

    def control(self, value: int) -> None:
        """The guest has written the message control word."""
        with self._lock:
            self.enabled = bool(value & ENABLE)
            self._all_masked = bool(value & MASK_ALL)
            if not self.enabled:
                self._pending = 0
            self._settle(range(self.count))

    def _settle(self, vectors: Any) -> None:
        """Route what may be sent now, in one go, and send what was waiting for that."""
        open = [vector for vector in vectors if not self._silent(vector)]
        changes: dict[int, Message | None] = {}
        for vector in open:
            address, data = unpack_from("<QI", self._table, ENTRY * vector)
            message = (address, data) if address >> 20 & 0xFFF == _INTERRUPTS else None
            if self._routed.get(vector) != message:
                changes[vector] = self._routed[vector] = message
        if changes:
            self._lines.route(changes)
        for vector in open:
            if self._pending >> vector & 1:
                self._pending &= ~(1 << vector)
                self._lines.fire(vector)

    # ---- accesses ------------------------------------------------------------------------------

    def read_table(self, offset: int, size: int) -> int:
        """Read the table; beyond its end there are zeros."""
        return int.from_bytes(self._table[offset : offset + size], "little")

    def write_table(self, offset: int, size: int, value: int) -> None:
        """Write the table: 4 or 8 bytes, aligned (6.8.2); anything else is ignored."""
        if size not in (4, 8) or offset % size or offset + size > len(self._table):
            return
        with self._lock:
            data = value.to_bytes(size, "little")
            self._table[offset : offset + size] = data
            vector = offset // ENTRY
            control = ENTRY * vector + 12
            pack_into("<I", self._table, control, self._table[control] & MASKED)
            self._settle((vector,))

    def read_pending(self, offset: int, size: int) -> int:
        """Read the pending bits, which only the device writes."""
        return self._pending >> 8 * offset & (1 << 8 * size) - 1

    # ---- life ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Table and pending bits; the control word is in the configuration space."""
        with self._lock:
            return {"table": self._table.hex(), "pending": self._pending}

    def restore(self, state: dict[str, Any], control: int) -> None:
        """Take over what :meth:`state` returned, and the control word. Nothing pending is lost."""
        with self._lock:
            self._table[:] = bytes.fromhex(state["table"])
            self._pending = 0
            self._routed.clear()
        self.control(control)
        with self._lock:
            self._pending = state["pending"]
            self._settle(range(self.count))

    def close(self) -> None:
        """Give the lines back. Idempotent."""
        self._lines.close()
