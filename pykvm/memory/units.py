"""Sizes and addresses as people write them, and the checks every number passes on its way in."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PAGE_SIZE = 4096  # x86's, and so KVM's unit of a memory slot (api.rst, 4.35)

_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(size: int | str) -> int:
    """Return a size in bytes: an int as it is, or text such as ``"2M"``.

    Text is a whole number in Python's notation (``"4096"``, ``"0x1000"``) and one of the suffixes
    K, M, G, T, each a power of 1024 and each also spelled KiB, MiB, GiB, TiB; case does not matter.

    Raises:
        ValueError: negative, not a whole number, or an unknown suffix (``"2MB"``: a million or
            2**20? so it is refused).
        TypeError: neither an int nor a str.
    """
    if type(size) is int and size >= 0:
        return size
    if not isinstance(size, str):
        number = checked_int(size, "a size")
        if number < 0:
            raise ValueError(f"a size cannot be negative: {number}")
        return number
    text = size.strip().upper()
    digits = text.removesuffix("IB") if text.endswith(("KIB", "MIB", "GIB", "TIB")) else text
    suffix = digits[-1:] if digits[-1:] in _SHIFTS else ""
    digits = digits.removesuffix(suffix)
    try:
        # int() would also take other scripts' digits, which nobody means.
        number = int(digits, 0) if digits.isascii() else -1
    except ValueError:
        number = -1
    if number < 0:
        raise ValueError(
            f'{size!r} is not a size: write bytes ("4096", "0x1000"), or a whole number of '
            'K, M, G or T ("512K", "2M", "1G")'
        )
    return number << _SHIFTS[suffix]


def format_size(size: int) -> str:
    """Return ``size`` bytes in the largest unit that divides it: 2097152 is ``"2M"``."""
    for suffix in "TGMK":
        unit = 1 << _SHIFTS[suffix]
        if size >= unit and size % unit == 0:
            return f"{size // unit}{suffix}"
    return f"{size}"


def checked_int(value: Any, what: str) -> int:
    """Return ``value`` as an int; a bool, a float or anything else is a TypeError naming ``what``.

    A bool passes for an int in Python, but as an address or a length it is a comparison that
    went astray.
    """
    if type(value) is int:
        return value
    if isinstance(value, bool):
        raise TypeError(f"{what} must be an int, not bool")
    try:
        return int(value.__index__())  # what operator.index does, without the import
    except (AttributeError, TypeError):
        raise TypeError(f"{what} must be an int, not {type(value).__name__}") from None


def check_pages(value: int, what: str) -> int:
    """Return ``value`` if it is a whole number of pages; else a ValueError naming ``what``."""
    if value % PAGE_SIZE:
        up = -(-value // PAGE_SIZE) * PAGE_SIZE
        raise ValueError(
            f"{what} {value:#x} is not a multiple of the page size {PAGE_SIZE:#x}; "
            f"the next one is {up:#x}"
        )
    return value
