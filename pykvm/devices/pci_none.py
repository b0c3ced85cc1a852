"""PCI configuration ports behind which there is nothing."""

from __future__ import annotations

from pykvm.devices.base import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.devices.bus import Bus
    from pykvm.devices.claim import Claim


class PciNone(Device):
    """Ports 0xcf8-0xcff without 0xcf9: all ones, in C.

    Also the address register does not keep what is written to it. That tells Linux that there is no
    PCI at all (its check of configuration mechanism 1), which saves it looking for devices.
    """

    def attach(self, bus: Bus, first: int) -> Claim:
        """Claim ``first``, but not ``first + 1`` (``ResetControl``), and 6 more up to the 8th."""
        self._keep(bus.ignore(first))
        return self._keep(bus.ignore(first + 2, 6))
