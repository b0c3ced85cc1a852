"""QEMU's pvpanic (docs/specs/pvpanic.rst): a port by which a guest says that it has panicked.

Linux's driver (``pvpanic-mmio``) finds it by the ACPI device QEMU0001.
"""

from __future__ import annotations

from pykvm.devices.base import ByteDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

EVENTS = {1 << 0: "panicked", 1 << 1: "crash-loaded"}
"""By their bits: it panicked; it panicked and handles that itself (kdump), so let it run on."""


class Pvpanic(ByteDevice):
    """One port; reads say which events are understood.

    Args:
        on_event: is called with ``"panicked"`` or ``"crash-loaded"``.
    """

    def __init__(self, on_event: Callable[[str], object]) -> None:
        super().__init__()
        self._on_event = on_event

    def read(self, offset: int) -> int:
        """Every event's bit."""
        return sum(EVENTS)

    def write(self, offset: int, value: int) -> None:
        """Tell of each event whose bit is set."""
        for bit, event in EVENTS.items():
            if value & bit:
                self._on_event(event)
