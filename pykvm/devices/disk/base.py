"""What a device asks of a disk."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from pykvm.devices.disk.host import Limits

SECTOR = 512
"""The unit of a disk's capacity, and of what is asked of it."""


class Disk:
    """A disk: sectors that can be read, and perhaps written.

    Offsets and lengths are in bytes and within the capacity: who calls has checked that. Whatever
    the host refuses is an OSError; then nothing is known of the range, and the disk can still be
    used. Not thread-safe: a device calls under its lock.

    Attributes:
        path: the image, for messages.
        readonly: it cannot be written.
        sectors: its capacity; the last one may be one that the file fills only in part.
        limits: the sizes that it prefers.
        can_discard: whether :meth:`discard` has ever a use.
        write_back: whether a write may be volatile until the next :meth:`flush`. If not, each write
            is stable when it is completed. To be set at will.
        failed: why no flush succeeds any more, or None.
    """

    path: str
    readonly: bool
    sectors: int
    limits: Limits
    can_discard: bool
    write_back: bool
    failed: OSError | None = None

    def read(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill all ``views``."""
        raise NotImplementedError

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        """Write all ``views``, whose contents may change meanwhile."""
        raise NotImplementedError

    def flush(self) -> None:
        """Make stable what was written before. Once it failed, it fails for ever."""
        raise NotImplementedError

    def discard(self, offset: int, length: int) -> None:
        """Give a range back to the host, as far as that is possible."""
        raise NotImplementedError

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Make a range zeros, and give its space back if ``unmap``."""
        raise NotImplementedError

    def refresh(self) -> bool:
        """Look whether the image has another size now, and take it over: whether it has."""
        raise NotImplementedError

    def lend(self) -> tuple[int, int, bool, bool, bool] | None:
        """What C needs to serve plain requests by itself, until :meth:`take_back`; None: it cannot.

        Returns:
            A descriptor, how many bytes can be reached by it, whether it may be written and that
            be volatile, whether a flush can be tried, and whether one has something to do.
        """
        return None

    def take_back(self, volatile: bool, flush_error: int) -> None:
        """What C did: whether a flush has something to do, and the errno of one that failed."""

    def close(self) -> None:
        """Let go of the image. Idempotent. What was not flushed, the host writes some time."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        from pykvm.memory.units import format_size

        how = "read-only" if self.readonly else "write-back" if self.write_back else "write-through"
        return f"<{type(self).__name__} {self.path} {format_size(self.sectors * SECTOR)}, {how}>"


def rest(views: Sequence[memoryview], done: int) -> list[memoryview]:
    """What of ``views`` is left when ``done`` bytes of them are done."""
    for index, view in enumerate(views):
        if done < view.nbytes:
            return [view[done:] if done else view, *views[index + 1 :]]
        done -= view.nbytes
    return []


def part(views: Sequence[memoryview], start: int, length: int) -> list[memoryview]:
    """The ``length`` bytes of ``views`` from ``start`` on."""
    found = []
    for view in rest(views, start):
        if length <= 0:
            break
        found.append(view[:length] if length < view.nbytes else view)
        length -= view.nbytes
    return found


def clear(views: Sequence[memoryview]) -> None:
    """Fill ``views`` with zeros."""
    for view in views:
        for at in range(0, view.nbytes, len(ZEROS)):
            size = min(len(ZEROS), view.nbytes - at)
            view[at : at + size] = ZEROS[:size]


ZEROS = memoryview(bytes(1 << 16))
"""What zeros are copied from."""
