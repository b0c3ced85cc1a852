"""A keyboard controller without a keyboard: only its reset line is there."""

from __future__ import annotations

from pykvm.devices.base import Device, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.devices.access import Access
    from pykvm.devices.bus import Bus
    from pykvm.devices.claim import Claim

DATA, COMMAND = 0, 4
"""Offsets of the two ports; the three between belong to others."""

NO_CONTROLLER = 0xFD
"""The status register: all ones, as if nobody were there, but for "input buffer full". Linux's
driver finds output that never ends and gives up after 16 bytes; its reboot code, which waits for
the input buffer, goes on at once."""

WRITE_OUTPUT_PORT = 0xD1
"""The next data byte goes to the output port, whose bit 0 is the reset line, active when low."""
PULSE = 0xF0
"""0xf0..0xff pulse those of the output port's lines 3..0 whose bit is 0; 0xfe is the reset line."""


class I8042(Device):
    """Ports 0x60 and 0x64: no keyboard, no mouse, but resets.

    Args:
        on_reset: is called with ``"i8042"``.
    """

    def __init__(self, on_reset: Callable[[str], object]) -> None:
        super().__init__()
        self._on_reset = on_reset
        self._output_next = False

    def attach(self, bus: Bus, first: int) -> Claim:
        """Claim ``first`` (data) and ``first + 4`` (status and command)."""
        self._keep(bus.handle(first + DATA, self._data))
        return self._keep(bus.handle(first + COMMAND, self._command))

    def _data(self, access: Access) -> int | None:
        if access.is_write and self._output_next:
            self._output_next = False
            if not access.value & 1:
                self._on_reset("i8042")
        return None

    def _command(self, access: Access) -> int | None:
        if not access.is_write:
            return NO_CONTROLLER
        command = access.value & 0xFF
        self._output_next = command == WRITE_OUTPUT_PORT
        if command >= PULSE and not command & 1:
            self._on_reset("i8042")
        return None

    def state(self) -> State:
        """Whether a data byte for the output port is expected."""
        return {"output_next": self._output_next}

    def restore(self, state: State) -> None:
        """Take over what :meth:`state` returned."""
        self._output_next = state["output_next"]
