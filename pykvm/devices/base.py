"""What the devices that Python serves have in common: windows on a bus, and plain state."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.devices.access import Access
    from pykvm.devices.bus import Bus
    from pykvm.devices.claim import Claim

State = dict[str, "Any"]
"""The state of a device: plain data that survives JSON."""


class Device:
    """A device with a window of :attr:`LENGTH` addresses.

    Subclasses serve :meth:`access`; one with several windows has an :meth:`attach` of its own.
    """

    LENGTH = 1

    def __init__(self) -> None:
        self._claims: list[Claim] = []

    def attach(self, bus: Bus, first: int) -> Claim:
        """Put the device on a bus, from port or address ``first`` on.

        Raises:
            BusOverlapError: something is there already.
        """
        return self._keep(bus.handle(first, self.access, self.LENGTH))

    def _keep(self, claim: Claim) -> Claim:
        self._claims.append(claim)
        return claim

    def access(self, access: Access) -> int | None:
        """Serve one access; what is returned answers a read."""
        raise NotImplementedError

    def state(self) -> State:
        """What the guest has made of the device, as plain data."""
        return {}

    def restore(self, state: State) -> None:
        """Take over what :meth:`state` returned."""

    def close(self) -> None:
        """Leave the bus. Idempotent."""
        for claim in self._claims:
            claim.release()
        self._claims.clear()


class ByteDevice(Device):
    """A device of 8-bit registers: a wider access is one cycle after the other, as on the ISA bus.

    What an access has beyond the window reads as all ones.
    """

    def access(self, access: Access) -> int | None:
        """Serve one access, byte by byte."""
        if access.is_write:
            for at, byte in enumerate(access.data):
                if access.offset + at < self.LENGTH:
                    self.write(access.offset + at, byte)
            return None
        value = 0
        for at in range(access.size):
            inside = access.offset + at < self.LENGTH
            value |= (self.read(access.offset + at) if inside else 0xFF) << 8 * at
        return value

    def read(self, offset: int) -> int:
        """Read one register, 0..255."""
        return 0xFF

    def write(self, offset: int, value: int) -> None:
        """Write one register."""
