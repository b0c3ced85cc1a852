"""Which pages the host wrote, for who has to put them back: KVM logs only what the guest writes."""

from __future__ import annotations

from pykvm._abi import ffi, lib

from .units import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .region import Region


class Pages:
    """Bitmaps of one region, a bit a page, in 64-bit words; C reads them, and clears `touched`.

    Attributes:
        touched: written by the API since the bits were cleared.
        exposed: lie under a raw view, so they may be written at any time.
    """

    __slots__ = ("exposed", "touched")

    def __init__(self, region: Region) -> None:
        words = (region.memory_size // PAGE_SIZE + 63) // 64
        self.touched: Any = ffi.new("uint64_t[]", words)
        self.exposed: Any = ffi.new("uint64_t[]", words)


class HostWrites:
    """The host's writes into a :class:`GuestMemory`; its ``track()`` makes it.

    Attributes:
        noted: called with region, offset and length of a write that is about to be made, or None.
    """

    __slots__ = ("_pages", "noted")

    def __init__(self) -> None:
        self._pages: dict[Region, Pages] = {}
        self.noted: Callable[[Region, int, int], None] | None = None

    def of(self, region: Region) -> Pages:
        """The bitmaps of a region."""
        pages = self._pages.get(region)
        if pages is None:
            pages = self._pages[region] = Pages(region)
        return pages

    def mark(self, region: Region, at: int, length: int) -> None:
        """Note a write of ``length`` bytes at an offset of a region."""
        if self.noted is not None:
            self.noted(region, at, length)
        _set(self.of(region).touched, at, length)

    def expose(self, region: Region, at: int, length: int) -> None:
        """Note that a view of the range was handed out."""
        _set(self.of(region).exposed, at, length)


def _set(bitmap: Any, at: int, length: int) -> None:
    """Set the bits of the pages of a range; from any thread."""
    if not length:
        return
    page = at // PAGE_SIZE
    lib.pykvm_pages_mark(bitmap, page, (at + length - 1) // PAGE_SIZE - page + 1)
