"""Names for addresses: from an ELF's symbols or a kernel's System.map."""

from __future__ import annotations

import os
from bisect import bisect_right

from pykvm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self


class Symbols:
    """A sorted table of names.

    Args:
        addresses: name → address.

    Attributes:
        addresses: the same.
    """

    def __init__(self, addresses: Mapping[str, int]) -> None:
        self.addresses = addresses
        pairs = sorted((address, name) for name, address in addresses.items() if address)
        self._addresses = [address for address, _ in pairs]
        self._names = [name for _, name in pairs]

    @classmethod
    def of_system_map(cls, path: str | os.PathLike[str]) -> Self:
        """Read a System.map: lines of address, type and name.

        Raises:
            ValueError: a line is something else; it is quoted.
        """
        addresses: dict[str, int] = {}
        with open(path, encoding="ascii", errors="replace") as file:
            for number, line in enumerate(file, 1):
                address, name = _symbol(path, number, line)
                addresses[name] = address
        return cls(addresses)

    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read an ELF file's symbols, or a System.map.

        Raises:
            BootError: its symbol table is malformed.
            ValueError: it is neither.
        """
        from pykvm.boot import elf

        with open(path, "rb") as file:
            start = file.read(4)
            if elf.is_elf(start):
                return cls(elf.read_symbols(start + file.read()))
        return cls.of_system_map(path)

    def address(self, name: str) -> int:
        """The address of ``name``, or of ``name+0x10``.

        Raises:
            LookupError: there is none of that name; those that resemble it are told.
        """
        if name in self.addresses:
            return self.addresses[name]
        plain, plus, offset = name.partition("+")
        if plus and plain.strip() in self.addresses:
            try:
                return self.addresses[plain.strip()] + int(offset, 0)
            except ValueError:
                raise LookupError(f"{name!r}: {offset!r} is no offset") from None
        from difflib import get_close_matches

        like = get_close_matches(plain, self.addresses, 3)
        raise LookupError(
            f"no symbol {plain!r}"
            + (f"; there is {', '.join(like)}" if like else "")
            + ("" if self.addresses else ": no symbols are known")
        )

    def name(self, address: int) -> str:
        """``name+0x12`` of the symbol at or before an address, or "" if there is none near."""
        at = bisect_right(self._addresses, address) - 1
        if at < 0 or address - self._addresses[at] > 1 << 20:
            return ""
        offset = address - self._addresses[at]
        return self._names[at] + (f"+{offset:#x}" if offset else "")


def check_system_map(path: str | os.PathLike[str]) -> None:
    """Look whether this is a System.map, by its first line: to read it all takes its time.

    Raises:
        BootError: it is none.
    """
    with open(path, encoding="ascii", errors="replace") as file:
        line = file.readline(1000)
    try:
        _symbol(path, 1, line)
    except ValueError as error:
        raise BootError(f"System.map: {error}") from None


def _symbol(path: str | os.PathLike[str], number: int, line: str) -> tuple[int, str]:
    fields = line.split()
    try:
        return int(fields[0], 16), fields[2]
    except (IndexError, ValueError):
        raise ValueError(f"{os.fspath(path)}, line {number} is no symbol: {line!r}") from None
