"""What a handler is given: one access to a port or to guest-physical memory.

An access is a value: it may be kept after the handler returned. The loop makes a fresh object for
every exit, from the word that the C loop returned (``csrc/pykvm.h``, ``enum pykvm_word``). Most
handlers look at the value, so it is an attribute (25 ns for every exit, where decoding it when
asked for takes 80); the other fields are decoded when asked for.
"""

from __future__ import annotations

OFFSET_SHIFT = 32
SIZE_SHIFT = 48
WRITE_SHIFT = 50
SLOT_SHIFT = 51
VALUE = (1 << OFFSET_SHIFT) - 1

_OFFSET = 0xFFFF
_SIZE = 3
_WRITE = 1 << WRITE_SHIFT


class Access:
    """One access of 1, 2 or 4 bytes, as the guest made it.

    A string instruction (``rep outsb``) makes one access an item.

    Attributes:
        value: what the guest writes, unsigned; 0 for a read.
    """

    __slots__ = ("_base", "_word", "value")
    _base: int
    _word: int
    value: int

    @property
    def size(self) -> int:
        """Width in bytes."""
        return 1 << (self._word >> SIZE_SHIFT & _SIZE)

    @property
    def is_write(self) -> bool:
        """True for OUT and stores, False for IN and loads, which the handler answers."""
        return bool(self._word & _WRITE)

    @property
    def offset(self) -> int:
        """Offset in bytes from the first address of the claimed range."""
        return self._word >> OFFSET_SHIFT & _OFFSET

    @property
    def data(self) -> bytes:
        """The written bytes, little endian; b"" for a read."""
        return self.value.to_bytes(self.size, "little") if self.is_write else b""


class PioAccess(Access):
    """An access to an I/O port."""

    __slots__ = ()

    @property
    def port(self) -> int:
        """The port, 0..0xffff."""
        return self._base + self.offset

    def __repr__(self) -> str:
        if self.is_write:
            return f"<out {self.port:#x}, {self.value:#0{2 + 2 * self.size}x}>"
        return f"<in {self.port:#x}, {self.size} byte{'s' * (self.size > 1)}>"


class MmioAccess(Access):
    """An access to guest-physical memory that is not RAM."""

    __slots__ = ()

    @property
    def gpa(self) -> int:
        """The guest-physical address."""
        return self._base + self.offset

    def __repr__(self) -> str:
        if self.is_write:
            return f"<store {self.gpa:#x}, {self.value:#0{2 + 2 * self.size}x}>"
        return f"<load {self.gpa:#x}, {self.size} byte{'s' * (self.size > 1)}>"


class WideAccess(MmioAccess):
    """An MMIO access whose width or offset does not fit the word: 8 bytes, or an odd number."""

    __slots__ = ("_is_write", "_offset", "_size")

    def __init__(self, base: int, offset: int, value: int, size: int, is_write: bool) -> None:
        self._base = base
        self._offset = offset
        self.value = value
        self._size = size
        self._is_write = is_write

    @property
    def size(self) -> int:
        """Width in bytes, 1..8."""
        return self._size

    @property
    def is_write(self) -> bool:
        """True for a store, False for a load, which the handler answers."""
        return self._is_write

    @property
    def offset(self) -> int:
        """Offset in bytes from the first address of the claimed range."""
        return self._offset
