"""The PCI bus of a machine: one bus, found by configuration mechanism 1 (ports 0xcf8 and 0xcfc).

What a guest reads of configuration space comes from C, so that looking for devices is cheap; what
it writes comes here. A base address register (BAR) that the guest programs moves the device's
claims on the bus: into the bridge's windows, and nowhere else.

Numbers in brackets are clauses of the PCI Local Bus Specification 3.0.
"""

from __future__ import annotations

from _thread import RLock
from struct import pack_into

from pykvm.arch.x86_64 import pc
from pykvm.devices.base import Device
from pykvm.devices.in_c import PciPorts
from pykvm.errors import BusOverlapError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.devices.access import PioAccess
    from pykvm.devices.base import State
    from pykvm.devices.bus import Bus
    from pykvm.devices.claim import Claim

SIZE = 256
"""Bytes of a function's configuration space."""
SLOTS = 32

COMMAND, STATUS, BARS, CAPABILITIES = 0x04, 0x06, 0x10, 0x34
"""Offsets of registers (6.1)."""
DECODE_IO, DECODE_MEMORY, BUS_MASTER, NO_INTX = 1, 2, 4, 1 << 10
"""Bits of the command register (6.2.2)."""
HAS_INTERRUPT, HAS_CAPABILITIES = 1 << 3, 1 << 4
"""Bits of the status register (6.2.3)."""
HOST_BRIDGE = 0x060000
"""Class code (appendix D)."""

_FIRST_CAPABILITY = 0x40
_BARS = 6


class Bar:
    """A range of addresses that a device has and a guest may move (6.2.5.1).

    Attributes:
        size: in bytes, a power of two.
        io: ports; else memory, below 4 GiB.
        mapped: where it is claimed now, or None.
        claims: what it claims there.
    """

    __slots__ = ("claims", "io", "mapped", "size")

    def __init__(self, size: int, *, io: bool = False) -> None:
        least, most = (4, 256) if io else (16, 1 << 28)
        if not least <= size <= most or size & (size - 1):
            raise ValueError(f"a BAR has {least}..{most} bytes, a power of two, not {size}")
        self.size = size
        self.io = io
        self.mapped: int | None = None
        self.claims: list[Claim] = []


class PciFunction:
    """Function 0 of a device: its configuration space. Subclasses serve the BARs.

    Args:
        vendor, device, class_code, revision: as they stand in its header (6.2.1).
        subsystem: vendor and device of the subsystem (6.2.4).

    Attributes:
        config: the 256 bytes.
        bars: by number.
        live: offset of four bytes that have to be computed when they are read, or 0.
    """

    def __init__(
        self,
        vendor: int,
        device: int,
        class_code: int,
        *,
        revision: int = 0,
        subsystem: tuple[int, int] = (0, 0),
    ) -> None:
        self.config = bytearray(SIZE)
        self._writable = bytearray(SIZE)
        self.bars: dict[int, Bar] = {}
        self.live = 0
        self._end, self._link = _FIRST_CAPABILITY, CAPABILITIES
        self._root: PciRoot | None = None
        pack_into("<HH", self.config, 0, vendor, device)
        pack_into("<I", self.config, 8, class_code << 8 | revision)
        pack_into("<HH", self.config, 0x2C, *subsystem)
        pack_into("<H", self._writable, COMMAND, DECODE_IO | DECODE_MEMORY | BUS_MASTER | NO_INTX)
        self._writable[0x0C] = self._writable[0x3C] = 0xFF  # cache line size, interrupt line

    # ---- what it is ----------------------------------------------------------------------------

    def add_bar(self, number: int, bar: Bar) -> None:
        """Give it a BAR; before it is on a bus."""
        if number not in range(_BARS) or number in self.bars:
            raise ValueError(f"there is no free BAR {number}")
        self.bars[number] = bar
        pack_into("<I", self.config, BARS + 4 * number, int(bar.io))
        pack_into("<I", self._writable, BARS + 4 * number, 0x1_0000_0000 - bar.size)

    def add_capability(self, id: int, body: bytes, writable: bytes = b"") -> int:
        """Append to the list of capabilities (6.7).

        Args:
            id: its kind.
            body: what follows the id and the link.
            writable: which bits of the body the guest may write.

        Returns:
            Where it is.
        """
        at = self._end
        if at + 2 + len(body) > SIZE:
            raise ValueError("the configuration space is full")
        self.config[self._link] = at
        self.config[at] = id
        self.config[at + 2 : at + 2 + len(body)] = body
        self._writable[at + 2 : at + 2 + len(writable)] = writable
        self.config[STATUS] |= HAS_CAPABILITIES
        self._link, self._end = at + 1, at + 2 + len(body) + 3 & ~3
        return at

    # ---- accesses, with the root's lock held ---------------------------------------------------

    def config_read(self, offset: int, size: int) -> int:
        """Read configuration space; beyond its end there is nothing."""
        return int.from_bytes(self.config[offset : offset + size], "little")

    def config_write(self, offset: int, data: bytes) -> None:
        """Write configuration space, as far as it can be written."""
        for at, byte in enumerate(data[: max(SIZE - offset, 0)], offset):
            mask = self._writable[at]
            if mask:
                self.config[at] = self.config[at] & ~mask | byte & mask
        if offset < BARS + 4 * _BARS and offset + len(data) > COMMAND and self._root is not None:
            self._root.settle()

    def wanted(self, number: int) -> int | None:
        """Where the guest wants a BAR to be, or None: it is switched off."""
        bar = self.bars[number]
        command = self.config[COMMAND]
        if not command & (DECODE_IO if bar.io else DECODE_MEMORY):
            return None
        return int.from_bytes(self.config[BARS + 4 * number :][:4], "little") & -bar.size

    def place(self, number: int, address: int) -> None:
        """Program a BAR, as firmware does."""
        low = int(self.bars[number].io)
        pack_into("<I", self.config, BARS + 4 * number, address | low)

    def claim(self, number: int, address: int) -> list[Claim]:
        """Claim the addresses of a BAR; to override.

        Whoever raises BusOverlapError has given back what was claimed until then.
        """
        return []

    # ---- life ----------------------------------------------------------------------------------

    def state(self) -> State:
        """What the guest has made of it, as plain data."""
        return {"config": self.config.hex()}

    def restore(self, state: State) -> None:
        """Take over what :meth:`state` returned."""
        self.config[:] = bytes.fromhex(state["config"])
        if self._root is not None:
            self._root.settle()

    def close(self) -> None:
        """Leave the bus. Idempotent."""
        for bar in self.bars.values():
            _unmap(bar)


class PciRoot(Device):
    """The host bridge and its bus.

    Attributes:
        functions: by device number; 0 is the bridge.
        ports: the registers of the configuration mechanism.
        lock: held by every access.
    """

    def __init__(self, pio: Bus, mmio: Bus) -> None:
        super().__init__()
        self.pio, self.mmio = pio, mmio
        self.lock = RLock()
        self.ports = PciPorts()
        self.functions: dict[int, PciFunction] = {}
        # What the next BAR may have: in each of the windows from its beginning on.
        self._next = {True: pc.PCI_PORTS, False: pc.PCI_MEMORY}
        self._claims += pio.pci(pc.PCI_ADDRESS, self.ports, self._data)
        # Next to the address register are the reset register, at 0xcf9, and nothing.
        self._keep(pio.ignore(pc.PCI_ADDRESS + 2, 2))
        self.add(PciFunction(0x8086, 0x1237, HOST_BRIDGE, revision=2))  # the 440FX's

    def add(self, function: PciFunction) -> int:
        """Put a device on the bus, its BARs programmed and switched off.

        Returns:
            Its number.

        Raises:
            ValueError: there is no room for it.
        """
        number = len(self.functions)
        if number == SLOTS:
            raise ValueError(f"a PCI bus has room for {SLOTS} devices")
        places = dict(self._next)
        for index, bar in sorted(function.bars.items(), key=lambda each: -each[1].size):
            address = places[bar.io] + bar.size - 1 & -bar.size
            first, length = _window(bar.io)
            if address + bar.size > first + length:
                raise ValueError("the windows for PCI devices are full")
            function.place(index, address)
            places[bar.io] = address + bar.size
        self._next = places
        function._root = self
        self.functions[number] = function
        self.ports.show(number, function.config, function.live)
        return number

    def _data(self, access: PioAccess) -> int | None:
        """An access to the data register that C does not serve: a write, or one of what is live."""
        address = self.ports.address
        function = self.functions.get(address >> 11 & 31)
        if not address >> 31 or address & 0x00FF_0700 or function is None:
            return None
        offset = access.offset
        size = min(access.size, 4 - offset)
        with self.lock:
            if access.is_write:
                function.config_write((address & 0xFC) + offset, access.data[:size])
                return None
            value = function.config_read((address & 0xFC) + offset, size)
        # What an access has beyond the four bytes that are addressed reads as ones.
        return value | ((1 << 8 * access.size) - (1 << 8 * size))

    def settle(self) -> None:
        """Have every BAR claimed where the guest wants it, where that is possible."""
        with self.lock:
            each = [
                (function, number, bar)
                for function in self.functions.values()
                for number, bar in function.bars.items()
            ]
            for function, number, bar in each:
                if bar.mapped is not None and bar.mapped != function.wanted(number):
                    _unmap(bar)
            for function, number, bar in each:
                address = function.wanted(number)
                if bar.mapped is None and address is not None and _fits(bar, address):
                    try:
                        bar.claims = function.claim(number, address)
                    except BusOverlapError:
                        continue  # another device was there first; it may move away
                    bar.mapped = address

    def state(self) -> State:
        """The address register; the devices have states of their own."""
        return {"address": self.ports.address}

    def restore(self, state: State) -> None:
        """Take over what :meth:`state` returned."""
        self.ports.address = state["address"]

    def close(self) -> None:
        """Leave the buses. Idempotent."""
        for function in self.functions.values():
            function.close()
        super().close()


def _window(io: bool) -> tuple[int, int]:
    """What the bridge hands on: first address and length."""
    if io:
        return pc.PCI_PORTS, pc.PCI_PORTS_LENGTH
    return pc.PCI_MEMORY, pc.PCI_MEMORY_LENGTH


def _fits(bar: Bar, address: int) -> bool:
    first, length = _window(bar.io)
    return first <= address and address + bar.size <= first + length


def _unmap(bar: Bar) -> None:
    for claim in bar.claims:
        claim.release()
    bar.claims = []
    bar.mapped = None


def claim_all(claims: list[Claim], *makers: Any) -> list[Claim]:
    """Call what makes claims, all or none: an overlap takes back those before it."""
    try:
        for make in makers:
            claims.append(make())
    except BaseException:
        for claim in claims:
            claim.release()
        raise
    return claims
