"""A disk whose writes go to a throw-away layer: the image below stays as it is."""

from __future__ import annotations

import errno

from pykvm.devices.disk.base import SECTOR, Disk, part
from pykvm.devices.disk.host import HostFile
from pykvm.devices.disk.raw import RawDisk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BLOCK = 4096
"""What is copied up when a part of it is written."""

MOST_KEPT = 256 << 20
"""Bytes of a layer that go into a snapshot."""


class OverlayDisk(Disk):
    """A copy-on-write layer over ``base``.

    The layer is a sparse file without a name that has every block where the disk has it, and a byte
    for each block that says whether it is there. Both cost what was written, not what could be; it
    is gone when the disk is closed, or the process ends.

    Args:
        base: what is below; it is owned from now on, and not written.
        layer: an empty file as large as ``base``; default: a temporary one in ``$TMPDIR``.
    """

    can_discard = True

    def __init__(self, base: Disk, layer: HostFile | None = None) -> None:
        size = base.sectors * SECTOR
        if layer is None:
            import tempfile

            layer = HostFile.temporary(tempfile.gettempdir(), size)
        self.base = base
        self.path = base.path
        self.readonly = False
        self.sectors = base.sectors
        self.limits = base.limits
        # Nothing of it outlives the process, so nothing is ever made stable.
        self.write_back = True
        self._file = layer
        self._layer = RawDisk(layer)
        self._present = bytearray(-(-size // BLOCK))

    def read(self, views: Sequence[memoryview], offset: int) -> None:
        """Read each piece from where it is."""
        length = sum(view.nbytes for view in views)
        for start, size, above in self._runs(offset, length):
            source = self._layer if above else self.base
            if not above and start + size > self.base.sectors * SECTOR:
                raise OSError(errno.EIO, "the image below has been cut shorter", self.path)
            source.read(part(views, start - offset, size), start)

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        """Write into the layer, after the rest of the first and last block was copied there."""
        length = sum(view.nbytes for view in views)
        if not length:
            return
        end = offset + length
        self._copy_up(offset, end)
        self._layer.write(views, offset)
        self._mark(offset, end)

    def flush(self) -> None:
        """Do nothing: the layer is as volatile as the process."""

    def discard(self, offset: int, length: int) -> None:
        """Drop whole blocks; they read as zeros then."""
        first, last = -(-offset // BLOCK), (offset + length) // BLOCK
        if offset + length == self.sectors * SECTOR:
            last = len(self._present)
        if first < last:
            start, end = first * BLOCK, min(last * BLOCK, self.sectors * SECTOR)
            self._layer.write_zeroes(start, end - start, True)
            self._mark(start, end)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Make a range zeros. The layer never keeps space for them."""
        end = offset + length
        self._copy_up(offset, end)
        self._layer.write_zeroes(offset, length, True)
        self._mark(offset, end)

    def _copy_up(self, offset: int, end: int) -> None:
        """Bring the first and the last block up if ``offset .. end`` covers them only in part."""
        disk_end = self.sectors * SECTOR
        if offset % BLOCK:
            self._bring(offset // BLOCK)
        if end % BLOCK and end != disk_end:
            self._bring(end // BLOCK)

    def _bring(self, block: int) -> None:
        if self._present[block]:
            return
        start = block * BLOCK
        size = min(BLOCK, self.sectors * SECTOR - start)
        data = memoryview(bytearray(size))
        self.base.read([data], start)
        self._layer.write([data], start)
        self._present[block] = 1

    def _mark(self, offset: int, end: int) -> None:
        first, last = offset // BLOCK, -(-end // BLOCK)
        self._present[first:last] = b"\1" * (last - first)

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """``offset .. offset + length`` in pieces: (start, size, whether it is in the layer)."""
        end = offset + length
        while offset < end:
            block = offset // BLOCK
            above = self._present[block]
            until = self._present.find(1 - above, block, -(-end // BLOCK))
            stop = end if until < 0 else min(end, until * BLOCK)
            yield offset, stop - offset, bool(above)
            offset = stop

    @property
    def written(self) -> int:
        """Bytes in blocks that the layer has."""
        return self._present.count(1) * BLOCK

    def layer_state(self) -> dict[str, str]:
        """The layer as plain data: what was written, packed.

        Raises:
            ValueError: it is more than a snapshot keeps.
        """
        import zlib
        from base64 import b64encode

        if self.written > MOST_KEPT:
            raise ValueError(
                f"{self.path}: {self.written} bytes were written to the overlay, and at most"
                f" {MOST_KEPT} are kept in a snapshot"
            )
        packer = zlib.compressobj(1)
        packed = bytearray()
        for start, size, above in self._runs(0, self.sectors * SECTOR):
            for at in range(start, start + size if above else start, 1 << 20):
                data = bytearray(min(1 << 20, start + size - at))
                self._layer.read([memoryview(data)], at)
                packed += packer.compress(data)
        packed += packer.flush()
        present = zlib.compress(bytes(self._present), 1)
        return {"present": b64encode(present).decode(), "blocks": b64encode(packed).decode()}

    def restore_layer(self, state: dict[str, str]) -> None:
        """Take over what :meth:`layer_state` returned, of an overlay over the same image.

        Raises:
            ValueError: it is of another size.
        """
        import zlib

        try:
            self._restore_layer(state)
        except zlib.error as error:
            raise ValueError(f"{self.path}: the overlay's state is damaged: {error}") from error

    def _restore_layer(self, state: dict[str, str]) -> None:
        import zlib
        from base64 import b64decode

        whole = self.sectors * SECTOR
        room = len(self._present)
        present = zlib.decompressobj().decompress(b64decode(state["present"]), room + 1)
        if len(present) != room or set(present) - {0, 1}:
            raise ValueError(f"{self.path}: the overlay's state is of a disk of another size")
        unpacker, packed = zlib.decompressobj(), b64decode(state["blocks"])
        self._layer.write_zeroes(0, whole, True)
        self._present[:] = present
        for start, size, above in self._runs(0, whole):
            for at in range(start, start + size if above else start, 1 << 20):
                length = min(1 << 20, start + size - at)
                data = unpacker.decompress(packed, length)
                packed = unpacker.unconsumed_tail
                if len(data) != length:
                    raise ValueError(f"{self.path}: the overlay's state has not all its blocks")
                self._layer.write([memoryview(data)], at)

    def refresh(self) -> bool:
        """Grow with the base. A base that shrank is left as it was seen first."""
        if not self.base.refresh() or self.base.sectors <= self.sectors:
            return False
        # A last block of the layer that was not whole has zeros where the base has grown.
        size = self.base.sectors * SECTOR
        if self._present and self._present[-1] and self.sectors * SECTOR % BLOCK:
            start = self.sectors * SECTOR
            rest = memoryview(bytearray(min(size, len(self._present) * BLOCK) - start))
            self.base.read([rest], start)
            self._file.truncate(size)
            self._layer.refresh()
            self._layer.write([rest], start)
        self._file.truncate(size)
        self._layer.refresh()
        self.sectors = self.base.sectors
        self._present.extend(bytes(-(-size // BLOCK) - len(self._present)))
        return True

    def close(self) -> None:
        """Throw the layer away. Idempotent."""
        self._layer.close()
        self.base.close()
