"""Port 0x80, where a BIOS shows how far it has come and where Linux writes to pass the time."""

from __future__ import annotations

from pykvm.devices.base import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.devices.bus import Bus
    from pykvm.devices.claim import Claim


class PostCode(Device):
    """One port; what is written vanishes, in C, and is counted by the claim."""

    def attach(self, bus: Bus, first: int) -> Claim:
        """Claim one port."""
        return self._keep(bus.ignore(first))
