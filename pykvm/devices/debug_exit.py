"""QEMU's ``isa-debug-exit``: a port by which a guest under test ends the run with a code."""

from __future__ import annotations

from pykvm.devices.base import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.devices.bus import Bus
    from pykvm.devices.claim import Claim


def qemu_status(code: int) -> int:
    """Give the exit status of the process that QEMU makes of a written value: always odd."""
    return (code << 1 | 1) & 0xFF


class DebugExit(Device):
    """A write of 1, 2 or 4 bytes ends the run; reads answer 0, as QEMU has it.

    Args:
        size: ports; QEMU's test set-ups use 4 from 0xf4 on.
        tag: the reason of the ``RunResult``; its code is the written value.
    """

    def __init__(self, size: int = 4, *, tag: str = "debug-exit") -> None:
        super().__init__()
        self._size = size
        self._tag = tag

    def attach(self, bus: Bus, first: int) -> Claim:
        """Claim the ports."""
        return self._keep(bus.stop(first, self._size, tag=self._tag, value=0))
