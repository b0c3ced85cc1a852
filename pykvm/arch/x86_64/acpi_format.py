"""What ACPI tables are made of: members without padding, a header, a checksum.

After ACPI 6.5, chapter 5.2. MP tables are made of the same.
"""

from __future__ import annotations

from struct import Struct
from struct import error as StructError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

OEM = b"PYKVM "
OEM_TABLE = b"PYKVM PC"
CREATOR = b"PKVM"

HEADER = Struct("<4sIBB6s8sI4sI")
"""Signature, length, revision, checksum, OEM, OEM table, OEM revision, creator, its revision."""


def checksum(data: bytes) -> int:
    """What has to stand in a table's checksum byte, 0 until now, for all bytes to sum up to 0."""
    return -sum(data) & 0xFF


class Layout:
    """The members of a structure and their formats, little endian, without padding."""

    def __init__(self, *members: tuple[str, str]) -> None:
        self.members = members
        self._struct = Struct("<" + "".join(form for _, form in members))
        self.size = self._struct.size

    def pack(self, values: dict[str, Any]) -> bytes:
        """Encode; members that are not given are 0."""
        known = {name for name, _ in self.members}
        if not known >= set(values):
            raise TypeError(f"no such member: {', '.join(sorted(set(values) - known))}")
        filled = [values.get(name, b"" if form[-1] == "s" else 0) for name, form in self.members]
        return self._struct.pack(*filled)

    def unpack(self, data: bytes, at: int = 0) -> dict[str, Any]:
        """Decode."""
        return dict(
            zip((n for n, _ in self.members), self._struct.unpack_from(data, at), strict=True)
        )

    def fill(self, values: dict[str, Any]) -> dict[str, Any]:
        """Give every member, those that are not given as 0."""
        return self.unpack(self.pack(values))


GAS = Layout(("space", "B"), ("width", "B"), ("offset", "B"), ("access", "B"), ("address", "Q"))
"""Generic Address Structure (5.2.3.2)."""
IO_SPACE = 1


def io_register(port: int, size: int) -> bytes:
    """Give the generic address of a register of ``size`` bytes at an I/O port."""
    access = {1: 1, 2: 2, 4: 3}[size]
    return GAS.pack({"space": IO_SPACE, "width": 8 * size, "access": access, "address": port})


def in_words(value: Any) -> str:
    """A member, as it is printed."""
    if not isinstance(value, bytes):
        return f"{value:#x}"
    if len(value) == GAS.size:
        gas = GAS.unpack(value)
        where = "I/O port" if gas["space"] == IO_SPACE else f"address space {gas['space']},"
        return f"{where} {gas['address']:#x}, {gas['width']} bits"
    return repr(value.rstrip(b"\0").decode("ascii", "backslashreplace"))


class Table:
    """A table with the common header (5.2.6). Subclasses say what follows it.

    Attributes:
        SIGNATURE, REVISION: of the header.
    """

    SIGNATURE = b"????"
    REVISION = 1

    def body(self) -> bytes:
        """What follows the header."""
        raise NotImplementedError

    @classmethod
    def from_body(cls, body: bytes) -> Self:
        """Make the table from what follows the header."""
        raise NotImplementedError

    def lines(self) -> list[str]:
        """What the table holds, to print."""
        raise NotImplementedError

    def encode(self) -> bytes:
        """Give the table's bytes, with its checksum."""
        body = self.body()
        length = HEADER.size + len(body)
        header = [self.SIGNATURE, length, self.REVISION, 0, OEM, OEM_TABLE, 1, CREATOR, 1]
        header[3] = checksum(HEADER.pack(*header) + body)
        return HEADER.pack(*header) + body

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Make the table from its bytes; what follows them is ignored.

        Raises:
            ValueError: another signature, a length that cannot be, a wrong checksum, or members
                that are cut off.
        """
        name = cls.SIGNATURE.decode()
        if len(data) < HEADER.size:
            raise ValueError(f"{name}: {len(data)} bytes are less than a header")
        signature, length, *_ = HEADER.unpack_from(data)
        if signature != cls.SIGNATURE:
            raise ValueError(f"{name}: the signature is {signature!r}")
        if not HEADER.size <= length <= len(data):
            raise ValueError(f"{name}: length {length}, of {len(data)} bytes")
        if sum(data[:length]) & 0xFF:
            raise ValueError(f"{name}: the bytes sum up to {sum(data[:length]) & 0xFF:#x}, not 0")
        try:
            return cls.from_body(data[HEADER.size : length])
        except (StructError, IndexError) as error:
            raise ValueError(f"{name}: cut off: {error}") from None

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.body() == self.body()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        name = self.SIGNATURE.decode()
        return "\n  ".join([f"<{name} revision {self.REVISION}>", *self.lines()])
