"""Guest memory as integers: what ``mem.u8``, ``mem.u16``, ``mem.u32`` and ``mem.u64`` are."""

from __future__ import annotations

from .units import checked_int

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .region import Region
    from .region_map import RegionMap

    # first gpa of a region, last gpa where a word fits in it, its words, its bytes
    Hit = tuple[int, int, memoryview, memoryview]

_NOTHING = memoryview(b"")
_MISS: Hit = (1, 0, _NOTHING, _NOTHING)  # no gpa lies in it


class Words:
    """Unsigned little-endian integers of one width, indexed by gpa: ``mem.u32[0x1000] += 1``.

    An address needs no alignment. An aligned access is one load or store of the host CPU, so that
    neither the guest nor Python sees half of a word; an unaligned one may tear.

    Raises, on access: GuestMemoryError outside RAM; TypeError for a gpa or value that is no int;
    ValueError for a value that does not fit.
    """

    # The region hit last is tried first, in a tuple, which other threads see whole or not at all.
    # It is never wrong: regions neither move nor shrink, and on close its cells are released.
    __slots__ = ("_low", "_map", "_read", "_shift", "_width", "_write")

    __iter__ = None  # else Python would count up from gpa 0 until an access fails

    def __init__(self, regions: RegionMap, width: int) -> None:
        self._map = regions
        self._width = width
        self._low = width - 1
        self._shift = width.bit_length() - 1
        self._read = self._write = _MISS

    def __getitem__(self, gpa: int) -> int:
        first, last, words, octets = self._read
        if type(gpa) is int and first <= gpa <= last:
            at = gpa - first
            if not at & self._low:
                return words[at >> self._shift]
            return int.from_bytes(octets[at : at + self._width], "little")
        return self._read_any(gpa)

    def __setitem__(self, gpa: int, value: int) -> None:
        first, last, words, octets = self._write
        if type(gpa) is int and first <= gpa <= last and type(value) is int:
            at = gpa - first
            try:
                if not at & self._low:
                    words[at >> self._shift] = value
                else:
                    octets[at : at + self._width] = value.to_bytes(self._width, "little")
                return
            except (ValueError, OverflowError):
                pass  # it does not fit: raised below, in words
        self._write_any(gpa, value)

    def forget(self) -> None:
        """Drop the remembered regions: at the end, or to have every write pass the door again."""
        self._read = self._write = _MISS

    def _read_any(self, gpa: int) -> int:
        pieces = self._map.readable(gpa, self._width)
        if len(pieces) == 1:
            self._read = self._hit(pieces[0][0])
            return self[checked_int(gpa, "a gpa")]
        data = b"".join(region.cells(1)[at : at + n] for region, at, n in pieces)
        return int.from_bytes(data, "little")

    def _write_any(self, gpa: int, value: int) -> None:
        value = checked_int(value, "a value")
        top = (1 << 8 * self._width) - 1
        if not 0 <= value <= top:
            raise ValueError(f"{value:#x} does not fit u{8 * self._width}: 0..{top:#x}")
        pieces = self._map.writable(gpa, self._width)
        if self._map.writes is not None:
            for piece in pieces:
                self._map.writes.mark(*piece)
            if len(pieces) == 1:  # in one store, as ever, but not remembered
                region, at, _ = pieces[0]
                if not at & self._low:
                    region.cells(self._width)[at >> self._shift] = value
                    return
        elif len(pieces) == 1:
            self._write = self._hit(pieces[0][0])
            self[checked_int(gpa, "a gpa")] = value
            return
        data = value.to_bytes(self._width, "little")
        for region, at, n in pieces:
            region.cells(1)[at : at + n] = data[:n]
            data = data[n:]

    def _hit(self, region: Region) -> Hit:
        width = self._width
        return region.guest_phys_addr, region.end - width, region.cells(width), region.cells(1)

    def __repr__(self) -> str:
        return f"<u{8 * self._width} words of {self._map.describe()}>"
