"""A host file that forgets: what was written is volatile until it is synced.

The rules are those of a page cache over a disk that keeps 512-byte sectors whole:

* after a cut, any subset of the sectors written since the last sync may be there, whatever the
  order of the writes, each with the contents of one of its writes;
* fdatasync makes all earlier writes stable, a write with RWF_DSYNC only itself;
* of two writes to the same sector the later one wins, if it got there at all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from pykvm.devices.disk.host import HostFile

SECTOR = 512

Change = tuple[int, bytes, bool]
"""(offset, data, whether it is stable), in the order written."""


class ForgetfulFile(HostFile):
    """The door to a host that may lose power.

    Attributes:
        instant: is called after every system call that changes something.
        syncs: how many syncs there were, of either kind.
        drop: the number of the sync that is left out, though the caller is told it was done.
        durable: what is stable for certain.
        volatile: what changed since, of which some may be stable as well.
    """

    def __init__(self, fd: int, path: str) -> None:
        super().__init__(fd, path)
        self.instant: Callable[[], None] = lambda: None
        self.honours_dsync = True
        self.syncs = 0
        self.drop = -1
        self.durable = bytearray(self.size())
        super().preadv([self.durable], 0)
        self.volatile: list[Change] = []

    def _sync(self) -> bool:
        """Count a sync; whether it is done."""
        self.syncs += 1
        return self.syncs - 1 != self.drop

    def pwritev(  # type: ignore[override]
        self, views: Sequence[memoryview], offset: int, sync: bool
    ) -> int:
        done = super().pwritev(views, offset, False)
        self.volatile.append((offset, b"".join(views)[:done], sync and self._sync()))
        self.instant()
        return done

    def fdatasync(self) -> None:
        if self._sync():
            for offset, data, _ in self.volatile:
                self.durable[offset : offset + len(data)] = data
            self.volatile.clear()
        self.instant()

    def punch(self, offset: int, length: int) -> None:
        super().punch(offset, length)
        self.volatile.append((offset, bytes(length), False))
        self.instant()

    zero = punch

    # ---- the cut

    def cuts(self, chance: random.Random) -> Iterator[bytearray]:
        """What may be on the medium if the power fails now: the extremes, then a few at random.

        The extremes come always: nothing volatile survived, all of it did. Then a prefix of the
        writes, whole writes in any selection, and writes of which some sectors are missing.
        """
        yield self._image(lambda number, sectors: ())
        if not self.volatile:
            return
        yield self._image(lambda number, sectors: range(sectors))
        length = chance.randint(0, len(self.volatile))
        last = chance.random()
        # The write at the prefix's end is torn: only its first sectors are there.
        yield self._image(
            lambda number, sectors: range(
                sectors if number < length else int(last * sectors) if number == length else 0
            )
        )
        yield self._image(lambda number, sectors: range(sectors) if chance.random() < 0.5 else ())
        yield self._image(
            lambda number, sectors: [n for n in range(sectors) if chance.random() < 0.5]
        )

    def _image(self, survivors: Callable[[int, int], Sequence[int]]) -> bytearray:
        """The medium with those sectors of each volatile write that ``survivors`` names."""
        image = bytearray(self.durable)
        for number, (offset, data, stable) in enumerate(self.volatile):
            sectors = len(data) // SECTOR
            for n in range(sectors) if stable else survivors(number, sectors):
                at = offset + n * SECTOR
                image[at : at + SECTOR] = data[n * SECTOR : (n + 1) * SECTOR]
        return image
