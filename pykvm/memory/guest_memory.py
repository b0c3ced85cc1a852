"""``GuestMemory``: the map of a guest's RAM, and the one door for every guest-physical address.

::

    mem = GuestMemory("2M")                    # RAM at gpa 0
    mem.add(0xFFFC0000, "256K", readonly=True, name="bios")
    mem.load(0xFFFC0000, bios)                 # the host fills a ROM; write() would be refused
    mem[0x1000:0x1004] = b"\\x90\\x90\\xeb\\xfe"
    mem.u32[0x2000] += 1
    frame = numpy.asarray(mem.view(0xA0000, 64000))    # no copy
"""

from __future__ import annotations

from pykvm.errors import GuestMemoryError

from .building import Building
from .region_map import GPA_LIMIT
from .units import checked_int, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from typing import Any, overload

    from typing_extensions import Buffer

    from .host_writes import HostWrites
    from .ram_table import RamTable
    from .region_map import Piece
    from .words import Words

    Plain = bytes | memoryview
    # first gpa, end gpa, mapping, the gpa of the mapping's byte 0
    Window = tuple[int, int, mmap.mmap, int]
    # first gpa, end gpa, the region as bytes
    Octets = tuple[int, int, memoryview]

_WIDTHS = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}
_FILL_CHUNK = 1 << 20
_DISCARD_FROM = 1 << 20  # from here on new pages cost less than the writing, if they are touched

# No gpa lies in them, not even an empty range.
_NO_WINDOW: Window = (1, 0, None, 0)  # type: ignore[assignment]
_NO_OCTETS: Octets = (1, 0, memoryview(b""))


class GuestMemory(Building):
    """Guest RAM and ROM as a sorted map of regions with holes between them.

    ``GuestMemory("2M")`` is 2 MiB of anonymous RAM at gpa 0; ``GuestMemory()`` is empty.

    Addresses are guest-physical, lengths are bytes. A range may span regions that adjoin. Whatever
    integers a guest supplies, an access returns data or raises ``GuestMemoryError`` with the
    address and the map; an access that raises has written nothing. No bytes may be accessed
    anywhere.

    Attributes:
        u8: the bytes as integers, ``mem.u8[gpa]``; see ``Words``.
        u16: 16-bit words at any gpa, little endian.
        u32: 32-bit words at any gpa, little endian.
        u64: 64-bit words at any gpa, little endian.
    """

    # The region read last and the one written last are tried first, each in a tuple, which other
    # threads see whole or not at all. They are never wrong, as regions neither move nor shrink.
    __slots__ = (
        "__weakref__", "_octets", "_ram", "_window", "_words", "u8", "u16", "u32", "u64",
    )  # fmt: skip

    __iter__ = None  # else Python would count up from gpa 0 until an access fails

    def __init__(self, size: int | str | None = None) -> None:
        super().__init__()
        self._ram: RamTable | None = None
        self._words: list[Words] = []  # those that were used
        self._window = _NO_WINDOW
        self._octets = _NO_OCTETS
        if size is not None:
            region = self.add(0, size)
            self._octets = (0, region.end, region.cells(1))  # most likely it is written next

    def __getattr__(self, name: str) -> Words:
        """Make u8, u16, u32 or u64 when it is first used."""
        width = _WIDTHS.get(name)
        if width is None:
            raise AttributeError(f"GuestMemory has no attribute {name!r}")
        from .words import Words

        words = Words(self._map, width)
        setattr(self, name, words)
        self._words.append(words)
        return words

    # ---- who else works on it

    def table(self) -> RamTable:
        """Return the table of regions for what C does in guest memory; made at first use."""
        self._map.check_open()
        if self._ram is None:
            from .ram_table import RamTable

            self._ram = RamTable(self)
        return self._ram

    def track(self) -> HostWrites:
        """Note from now on which pages the host writes; writing costs a little more then.

        Pages under a writable view, also one handed out before, count as exposed: nobody can tell
        when they are written. So do the rings of virtio devices; their buffers are noted.
        """
        self._map.check_open()
        writes = self._map.writes
        if writes is None:
            from .host_writes import HostWrites

            self._map.writes = writes = HostWrites()
            self._octets = _NO_OCTETS
            for words in self._words:
                words.forget()
            for piece in self._map.exposed:
                writes.expose(*piece)
            if self._ram is not None:
                self._ram.publish()
        return writes

    # ---- access

    if TYPE_CHECKING:

        @overload
        def __getitem__(self, key: int) -> int: ...
        @overload
        def __getitem__(self, key: slice) -> bytes: ...

    def __getitem__(self, key: int | slice) -> int | bytes:
        """``mem[gpa]`` is a byte, ``mem[gpa:end]`` are bytes; both ends of a slice are needed."""
        if type(key) is not slice:
            return self.u8[key]
        gpa, stop = key.start, key.stop
        start, end, mapping, base = self._window
        if (
            type(gpa) is int
            and type(stop) is int
            and start <= gpa < stop <= end
            and key.step is None
        ):
            return mapping[gpa - base : stop - base]
        return self._read_any(*_span(key))

    if TYPE_CHECKING:

        @overload
        def __setitem__(self, key: int, value: int) -> None: ...
        @overload
        def __setitem__(self, key: slice, value: Buffer) -> None: ...

    def __setitem__(self, key: int | slice, value: Any) -> None:
        """``mem[gpa] = byte``; ``mem[gpa:end] = bytes-like`` of exactly that length."""
        if type(key) is not slice:
            self.u8[key] = value
            return
        gpa, stop = key.start, key.stop
        start, end, octets = self._octets
        if (
            type(gpa) is int
            and type(stop) is int
            and start <= gpa < stop <= end
            and key.step is None
        ):
            try:
                octets[gpa - start : stop - start] = value
                return
            except (TypeError, ValueError):
                pass  # another length, or items that are no bytes: sorted out below
        gpa, length = _span(key)
        data = _plain(value)
        if len(data) != length:
            raise ValueError(
                f"{len(data)} bytes do not fill {gpa:#x}..{gpa + length:#x}, which are {length}"
            )
        self._write(gpa, data)

    def read(self, gpa: int, length: int) -> bytes:
        """Return a copy of ``length`` bytes from ``gpa``."""
        start, end, mapping, base = self._window
        if type(gpa) is int and type(length) is int and start <= gpa < gpa + length <= end:
            return mapping[gpa - base : gpa - base + length]
        return self._read_any(gpa, length)

    def write(self, gpa: int, data: Buffer) -> None:
        """Write all of ``data`` (anything bytes-like) at ``gpa``."""
        data = _plain(data)
        start, end, octets = self._octets
        if type(gpa) is int and start <= gpa <= end - len(data):
            octets[gpa - start : gpa - start + len(data)] = data
            return
        self._write(gpa, data)

    def load(self, gpa: int, data: Buffer) -> None:
        """Write ``data`` as ``write`` does, and also into read-only regions: the host fills a ROM.

        Only a file mapped shared and read-only stays closed to it.
        """
        data = _plain(data)
        start, end, octets = self._octets
        if type(gpa) is int and start <= gpa <= end - len(data):
            octets[gpa - start : gpa - start + len(data)] = data
            return
        pieces = self._map.writable(gpa, len(data), rom=True)
        if self._map.writes is not None:
            _mark(self._map.writes, pieces)
        _store(pieces, data)

    def view(self, gpa: int, length: int) -> memoryview:
        """Return a memoryview of ``length`` bytes from ``gpa``, without a copy, for any length.

        Writes through it are the guest's to see at once. It is read-only if the region is, and lies
        in one region: GuestMemoryError if the range spans two. While it, or whatever was made of
        it (``numpy.asarray(view)``), is alive, the mapping is, also past ``close()``.
        """
        start, end, octets = self._octets
        if type(gpa) is int and type(length) is int and start <= gpa < gpa + length <= end:
            self._map.expose(self._map.regions[self._map.index(gpa) - 1], gpa - start, length)
            return octets[gpa - start : gpa - start + length]
        pieces = self._map.readable(gpa, length)
        if len(pieces) != 1:
            if not pieces:
                return memoryview(b"")
            raise GuestMemoryError(
                f"{gpa:#x}..{gpa + length:#x} spans {len(pieces)} regions, and a view lies in one; "
                f"{self._map.describe(gpa)}",
                gpa,
                length,
            )
        region, at, _ = pieces[0]
        view = region.cells(1)[at : at + length]
        if region.readonly:
            return view.toreadonly()
        self._map.expose(region, at, length)
        return view

    def fill(self, gpa: int, length: int, value: int = 0) -> None:
        """Set ``length`` bytes from ``gpa`` to the byte ``value``.

        A large range of anonymous memory becomes zero by giving its pages back to the host, so that
        what was never touched stays untouched.
        """
        if not 0 <= checked_int(value, "a value") <= 0xFF:
            raise ValueError(f"{value:#x} does not fit a byte: 0..0xff")
        pieces = self._map.writable(gpa, length)
        if self._map.writes is not None:
            _mark(self._map.writes, pieces)
        chunk = bytes((value,)) * min(length, _FILL_CHUNK)
        for region, at, size in pieces:
            cells, end = region.cells(1), at + size
            if not value and size >= _DISCARD_FROM:
                first, last = region.discard(at, size)
                cells[at:first] = bytes(first - at)
                at = last
            for start in range(at, end, _FILL_CHUNK):
                stop = min(end, start + _FILL_CHUNK)
                cells[start:stop] = chunk[: stop - start]

    def find(self, pattern: Buffer, start: int = 0, stop: int | None = None) -> int | None:
        """Return the gpa of the first ``pattern`` within ``start .. stop``, or None.

        Holes are skipped; a match may span regions that adjoin.
        """
        self._map.check_open()
        wanted = bytes(_plain(pattern))
        start = checked_int(start, "a gpa")
        stop = GPA_LIMIT if stop is None else checked_int(stop, "a gpa")
        if not wanted:
            raise ValueError("an empty pattern is everywhere")
        for region in self._map.regions:
            first, last = max(start, region.guest_phys_addr), min(stop, region.end)
            if first >= last:
                continue
            _, _, mapping, base = region.read_window()
            if (at := mapping.find(wanted, first - base, last - base)) >= 0:
                return base + at
            # What begins in this region and ends beyond it.
            seam = max(first, region.end - len(wanted) + 1)
            ahead = region.end
            while ahead < min(stop, region.end + len(wanted) - 1):
                if (following := self._map.find(ahead)) is None:
                    break
                ahead = min(following.end, stop, region.end + len(wanted) - 1)
            if ahead > region.end and (at := self.read(seam, ahead - seam).find(wanted)) >= 0:
                return seam + at
        return None

    def cstring(self, gpa: int, max: int = 4096) -> bytes:
        """Return the bytes from ``gpa`` up to a NUL, which is left off.

        Raises:
            GuestMemoryError: no NUL among the first ``max`` bytes, or RAM ends before one.
        """
        gpa = checked_int(gpa, "a gpa")
        left = checked_int(max, "a length")
        text = b""
        while left > 0:
            region, at, _ = self._map.readable(gpa + len(text), 1)[0]
            size = min(left, region.memory_size - at)
            head, nul, _ = self.read(gpa + len(text), size).partition(b"\0")
            text += head
            if nul:
                return text
            left -= size
        raise GuestMemoryError(f"no NUL in the {max} bytes from {gpa:#x}", gpa, max)

    # ---- the end

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called."""
        return self._map.closed

    def close(self) -> None:
        """Give the host memory back. Close the VM first: its slots point here. Idempotent.

        While a view is alive its mapping is; no access through this object is possible any more.
        """
        if self._map.closed:
            return
        self._map.closed = True
        self._window, self._octets = _NO_WINDOW, _NO_OCTETS
        self._ram = None
        for words in self._words:
            words.forget()
        self._register.clear()
        for region in self._map.regions:
            region.close()

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        regions = self._map.regions
        state = "closed, was " if self.closed else ""
        head = f"<GuestMemory {state}{format_size(self.size)} in {len(regions)} regions"
        return "\n  ".join([head, *(region.describe() for region in regions)]) + ">"

    # ---- inside

    def _read_any(self, gpa: int, length: int) -> bytes:
        pieces = self._map.readable(gpa, length)
        if len(pieces) == 1:
            self._window = pieces[0][0].read_window()
        return b"".join(region.cells(1)[at : at + size] for region, at, size in pieces)

    def _write(self, gpa: int, data: Plain) -> None:
        pieces = self._map.writable(gpa, len(data))
        if self._map.writes is not None:
            _mark(self._map.writes, pieces)
        elif len(pieces) == 1:
            region = pieces[0][0]
            self._octets = (region.guest_phys_addr, region.end, region.cells(1))
        _store(pieces, data)


def _span(key: slice) -> tuple[int, int]:
    """Return (gpa, length) of a slice that gives both ends and no step."""
    if key.step is not None:
        raise ValueError("guest memory is sliced without a step")
    if key.start is None or key.stop is None:
        raise ValueError("give both ends of the slice: mem[gpa:end] (or read(), write(), view())")
    gpa, stop = checked_int(key.start, "a gpa"), checked_int(key.stop, "a gpa")
    if gpa < 0 or stop < 0:
        raise GuestMemoryError(
            f"a gpa cannot be negative, nothing counts from the end: [{gpa:#x}:{stop:#x}]", gpa
        )
    if stop < gpa:
        raise ValueError(f"the slice ends before it begins: [{gpa:#x}:{stop:#x}]")
    return gpa, stop - gpa


def _plain(data: Any) -> Plain:
    """Return any bytes-like object as plain bytes, without a copy where it can be done."""
    if type(data) is bytes:
        return data
    view = memoryview(data)
    return view.cast("B") if view.c_contiguous else view.tobytes()


def _mark(writes: HostWrites, pieces: list[Piece]) -> None:
    for piece in pieces:
        writes.mark(*piece)


def _store(pieces: list[Piece], data: Plain) -> None:
    """Write ``data`` over pieces of exactly its length."""
    if len(pieces) > 1:
        data = bytes(data)  # it may be a view of the very memory that is written piece by piece
    for region, at, size in pieces:
        region.cells(1)[at : at + size] = data[:size]
        data = data[size:]
