"""Load a flat binary: bytes that go to one address and start there."""

from __future__ import annotations

from pykvm.boot.ram import require_ram
from pykvm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.boot.ram import Buffer, Memory


def load(mem: Memory, data: Buffer, at: int) -> int:
    """Copy ``data`` to guest-physical address ``at`` and return the entry, which is ``at``.

    Raises BootError when there is nothing to load, or when it does not fit into RAM; then nothing
    has been written.
    """
    if not len(data):
        raise BootError("flat image: length: expected at least 1 byte, found 0")
    require_ram(mem, at, len(data), "the flat image")
    mem.load(at, data)
    return at
