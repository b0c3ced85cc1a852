"""QEMU's ``pc-testdev``, which guests that test KVM expect (hw/misc/pc-testdev.c)."""

from __future__ import annotations

from pykvm.devices.base import ByteDevice, Device, State
from pykvm.errors import GuestMemoryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.devices.access import Access
    from pykvm.devices.bus import Bus
    from pykvm.memory import GuestMemory

PORTS = 0xE0
"""Four ports that read back what was written, at any width."""
FLUSH = 0xE4
"""A guest-physical address written here has its page taken out of KVM's tables."""
BYTE_PORTS = 0xE8
"""The same four ports again."""
LINES = 0x2000
"""A port for each interrupt line: the level is written."""
LINE_COUNT = 24
IO_MEMORY = 0xFF00_0000
"""Memory that exits on every access."""
IO_MEMORY_SIZE = 0x10000


class _Ports(ByteDevice):
    LENGTH = 4

    def __init__(self, data: bytearray) -> None:
        super().__init__()
        self._data = data

    def read(self, offset: int) -> int:
        return self._data[offset]

    def write(self, offset: int, value: int) -> None:
        self._data[offset] = value


class _Lines(ByteDevice):
    LENGTH = LINE_COUNT

    def __init__(self, on_line: Callable[[int, int], object] | None) -> None:
        super().__init__()
        self._on_line = on_line

    def write(self, offset: int, value: int) -> None:
        if self._on_line is not None:
            self._on_line(offset, int(value != 0))


class TestDevice(Device):
    """All of it, at QEMU's addresses.

    Args:
        on_line: is called with a GSI below 24 and a level, 0 or 1.
        on_flush: is called with a page-aligned guest-physical address. A guest sees no difference
            if nothing is done: its page is mapped anew at the next access.
    """

    __test__ = False  # pytest: this is no test

    def __init__(
        self,
        on_line: Callable[[int, int], object] | None = None,
        on_flush: Callable[[int], object] | None = None,
    ) -> None:
        super().__init__()
        self._ports = bytearray(4)
        self._memory = bytearray(IO_MEMORY_SIZE)
        self._on_flush = on_flush
        self._parts = (_Ports(self._ports), _Ports(self._ports), _Lines(on_line))

    def attach_all(self, pio: Bus, mmio: Bus, *, byte_ports: bool = True) -> None:
        """Claim everything on both buses.

        Args:
            pio, mmio: the buses.
            byte_ports: the second set of ports, 0xe8-0xeb, where something else may have 0xe9.
        """
        for part, first in zip(self._parts, (PORTS, BYTE_PORTS, LINES), strict=True):
            if byte_ports or first != BYTE_PORTS:
                part.attach(pio, first)
        self._keep(pio.handle(FLUSH, self._flush, 4))
        self._keep(mmio.handle(IO_MEMORY, self.access, IO_MEMORY_SIZE))

    def _flush(self, access: Access) -> None:
        if access.is_write and self._on_flush is not None:
            self._on_flush(access.value & ~0xFFF)

    def access(self, access: Access) -> int | None:
        """Serve the I/O memory."""
        at, end = access.offset, access.offset + access.size
        if access.is_write:
            self._memory[at:end] = access.data[: IO_MEMORY_SIZE - at]
            return None
        return int.from_bytes(self._memory[at:end], "little")

    def state(self) -> State:
        """The ports and, as far as it is not zero, the I/O memory."""
        return {"ports": list(self._ports), "memory": list(self._memory.rstrip(b"\0"))}

    def restore(self, state: State) -> None:
        """Take over what :meth:`state` returned."""
        self._ports[:] = bytes(state["ports"])
        self._memory[:] = bytes(state["memory"]).ljust(IO_MEMORY_SIZE, b"\0")

    def close(self) -> None:
        """Leave both buses. Idempotent."""
        for part in self._parts:
            part.close()
        super().close()


PAGE = 0x1000
_READ_WRITE, _EXEC = 1 | 2, 4
"""PROT_* of mprotect(2)."""


def flush_page(memory: GuestMemory, gpa: int) -> None:
    """Have KVM take the page at ``gpa`` out of its tables: the guest's next access faults it in.

    Linux tells KVM when it changes how this process may use a page. It gains the right to execute
    and loses it again, so that it can be read and written all the while, by other vCPUs too. What
    is not a plain page of RAM is left alone.
    """
    try:
        region = memory.region_at(gpa)
    except GuestMemoryError:
        return
    at = gpa - region.guest_phys_addr
    if not region.writable_by_host or at + PAGE > region.memory_size:
        return
    import ctypes

    mprotect = ctypes.CDLL(None).mprotect
    address, size = ctypes.c_void_p(region.userspace_addr + at), ctypes.c_size_t(PAGE)
    if mprotect(address, size, _READ_WRITE | _EXEC) == 0:
        mprotect(address, size, _READ_WRITE)
