"""An IOAPIC in this process, for local APICs in the kernel (KVM_CAP_SPLIT_IRQCHIP).

Intel's 82093AA (order number 290566) with the 24 inputs, the version and the EOI register of its
successors. Every input that is not masked is a route of KVM's, its GSI to the message that the
redirection table says: so an irqfd interrupts without this process. What is left to us are levels,
which are sent again until their line is low, when the guest ends the interrupt.
"""

from __future__ import annotations

from _thread import RLock

from pykvm.arch.x86_64 import pc
from pykvm.devices.base import Device, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.devices.access import Access

    Routes = list[tuple[int, int, int]]

SELECT, WINDOW, EOI = 0x00, 0x10, 0x40
"""Offsets of the registers that a guest sees; the others are behind the window."""
ID, VERSION, ARBITRATION, TABLE = 0x00, 0x01, 0x02, 0x10
"""Numbers for SELECT; from TABLE on two for each input, the lower half first."""

PINS = pc.IOAPIC_PINS
VERSION_VALUE = 0x20 | PINS - 1 << 16
"""Version 20H: the first with an EOI register, which guests need that end interrupts by it."""

# An entry of the redirection table (3.2.4).
VECTOR = 0xFF
DELIVERY_MODE = 0x700
LOGICAL = 1 << 11
REMOTE_IRR = 1 << 14
LEVEL = 1 << 15
MASKED = 1 << 16
DESTINATION_SHIFT = 56
WRITABLE = 0xFF << DESTINATION_SHIFT | MASKED | LEVEL | 1 << 13 | LOGICAL | DELIVERY_MODE | VECTOR
"""All but the two that say how it goes: delivery status, bit 12, and remote IRR."""

# A message-signalled interrupt (Intel SDM Vol. 3, 12.11).
MSI_ADDRESS = pc.LAPIC
MSI_DESTINATION_SHIFT = 12
MSI_LOGICAL = 1 << 2


def message(entry: int) -> tuple[int, int]:
    """Address and data of the message that an entry sends.

    The bits of the data are those of the entry.
    """
    address = MSI_ADDRESS | (entry >> DESTINATION_SHIFT & 0xFF) << MSI_DESTINATION_SHIFT
    if entry & LOGICAL:
        address |= MSI_LOGICAL
    return address, entry & (LEVEL | DELIVERY_MODE | VECTOR)


class Ioapic(Device):
    """24 inputs; a GSI is an input of the same number.

    Args:
        route: is called with all routes, ``(gsi, address, data)``, when they have changed.
        send: is called with a GSI to send the message of its route; answers how many processors
            took it, not above 0 if none did.
    """

    LENGTH = 0x1000

    def __init__(self, route: Callable[[Routes], object], send: Callable[[int], int]) -> None:
        super().__init__()
        self._route = route
        self._send = send
        self._routes: Routes = []
        self._entries = [MASKED] * PINS
        self._lines = 0
        self._select = 0
        self._id = 0
        self._lock = RLock()  # lines come from any thread

    # ---- interrupts ----------------------------------------------------------------------------

    def line(self, gsi: int, level: int) -> None:
        """Raise or lower an input. An edge at a masked one is lost, as in the 82093AA.

        Raises:
            ValueError: there is no such input.
        """
        if not 0 <= gsi < PINS:
            raise ValueError(f"the IOAPIC has inputs 0..{PINS - 1}, not {gsi}")
        with self._lock:
            rises = bool(level) and not self._lines >> gsi & 1
            self._lines = self._lines & ~(1 << gsi) | bool(level) << gsi
            entry = self._entries[gsi]
            if entry & LEVEL:
                self._serve(gsi)
            elif rises and not entry & MASKED:
                self._send(gsi)

    def end_of_interrupt(self, vector: int) -> None:
        """A processor has ended a level-triggered interrupt (KVM_EXIT_IOAPIC_EOI)."""
        with self._lock:
            for pin, entry in enumerate(self._entries):
                if entry & REMOTE_IRR and entry & VECTOR == vector:
                    self._entries[pin] = entry & ~REMOTE_IRR
                    self._serve(pin)

    def _serve(self, pin: int) -> None:
        """Send a level-triggered interrupt if the line is high and the last one has ended."""
        entry = self._entries[pin]
        if not self._lines >> pin & 1 or entry & (MASKED | REMOTE_IRR) or not entry & LEVEL:
            return
        if self._send(pin) > 0:
            self._entries[pin] |= REMOTE_IRR

    def _changed(self) -> None:
        routes = [
            (pin, *message(entry)) for pin, entry in enumerate(self._entries) if not entry & MASKED
        ]
        if routes != self._routes:
            self._routes = routes
            self._route(routes)

    # ---- registers -----------------------------------------------------------------------------

    def access(self, access: Access) -> int | None:
        """Serve one access. The registers are 32 bits wide, and anything else reads as 0."""
        with self._lock:
            if access.offset == SELECT:
                if access.is_write:
                    self._select = access.value & 0xFF
                return self._select
            if access.offset == WINDOW:
                if access.is_write:
                    self._write(access.value & 0xFFFF_FFFF)
                    return None
                return self._read() & (1 << 8 * access.size) - 1
            if access.offset == EOI and access.is_write:
                self.end_of_interrupt(access.value & VECTOR)
        return 0

    def _read(self) -> int:
        if self._select in (ID, ARBITRATION):
            return self._id << 24
        if self._select == VERSION:
            return VERSION_VALUE
        pin, high = divmod(self._select - TABLE, 2)
        if 0 <= pin < PINS:
            return self._entries[pin] >> 32 * high & 0xFFFF_FFFF
        return 0

    def _write(self, value: int) -> None:
        if self._select == ID:
            self._id = value >> 24 & 0xF
            return
        pin, high = divmod(self._select - TABLE, 2)
        if not 0 <= pin < PINS:
            return
        old = self._entries[pin]
        half = 0xFFFF_FFFF << 32 * high
        entry = old & ~(WRITABLE & half) | value << 32 * high & WRITABLE
        if not entry & LEVEL:
            entry &= ~REMOTE_IRR  # guests end a level-triggered interrupt so where EOI is missing
        self._entries[pin] = entry
        self._changed()
        self._serve(pin)

    # ---- life ----------------------------------------------------------------------------------

    def state(self) -> State:
        """The redirection table, the lines, and the two small registers."""
        with self._lock:
            return {
                "entries": list(self._entries),
                "lines": self._lines,
                "select": self._select,
                "id": self._id,
            }

    def restore(self, state: State) -> None:
        """Take over what :meth:`state` returned. Nothing is sent by it."""
        with self._lock:
            self._entries[:] = state["entries"]
            self._lines, self._select, self._id = state["lines"], state["select"], state["id"]
            self._changed()
