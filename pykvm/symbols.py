"""Names for addresses: from an ELF's symbols or a kernel's System.map."""

from __future__ import annotations

from bisect import bisect_right

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from typing import Self


class Symbols:
    """A sorted table of names.

    Args:
        addresses: name → address.
    """

    def __init__(self, addresses: Mapping[str, int]) -> None:
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
                fields = line.split()
                try:
                    addresses[fields[2]] = int(fields[0], 16)
                except (IndexError, ValueError):
                    raise ValueError(f"{path}, line {number} is no symbol: {line!r}") from None
        return cls(addresses)

    def name(self, address: int) -> str:
        """``name+0x12`` of the symbol at or before an address, or "" if there is none near."""
        at = bisect_right(self._addresses, address) - 1
        if at < 0 or address - self._addresses[at] > 1 << 20:
            return ""
        offset = address - self._addresses[at]
        return self._names[at] + (f"+{offset:#x}" if offset else "")
