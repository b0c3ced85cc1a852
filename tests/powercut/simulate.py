"""Random requests to a block device, power cuts at every instant, and the oracle that judges them.

The oracle knows nothing of system calls. It knows what the driver of a disk knows: what it sent,
what was answered, and what virtio promises (1.2, 5.2.6.2: when a write becomes stable).
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field

from pykvm.devices.disk.raw import RawDisk
from pykvm.devices.virtio.blk import Blk
from pykvm.devices.virtio.blk_request import S_OK
from tests.powercut.storage import SECTOR, ForgetfulFile
from tests.support.chains import BlkDriver

SECTORS = 64
MODES = ("writeback", "writethrough", "toggled", "synced")
"""The cache mode: of the host's choice, or changed by the driver now and then; "synced" is
write-through on a file system without RWF_DSYNC."""

WRITEBACK_FIELD = 32
ANYTHING = b""
"""What a discarded sector holds."""


def pattern(number: int, sector: int) -> bytes:
    """512 bytes that no other write, and no other sector, has."""
    return (number.to_bytes(8, "little") + sector.to_bytes(8, "little")) * 32


class Oracle:
    """Every version of every sector, and the oldest that a cut may show."""

    def __init__(self) -> None:
        self.versions = [[pattern(0, n)] for n in range(SECTORS)]
        self.oldest = [0] * SECTORS

    def submitted(self, sector: int, data: list[bytes]) -> None:
        """A change was sent: from now on a cut may show it."""
        for n, content in enumerate(data, start=sector):
            self.versions[n].append(content)

    def stable(self, first: int = 0, count: int = SECTORS) -> None:
        """What was answered there so far is stable: nothing older may be shown any more."""
        for n in range(first, first + count):
            self.oldest[n] = len(self.versions[n]) - 1

    def lost(self, image: bytearray) -> list[int]:
        """The sectors that hold what they must not."""
        wrong = []
        for n in range(SECTORS):
            allowed = self.versions[n][self.oldest[n] :]
            if ANYTHING not in allowed and image[n * SECTOR : (n + 1) * SECTOR] not in allowed:
                wrong.append(n)
        return wrong


@dataclass
class Tally:
    """What a simulation found.

    Attributes:
        cuts: power cuts judged.
        flushes: flushes that were acknowledged.
        requests: requests that were.
        syncs: of the last workload: fdatasync, and writes with RWF_DSYNC.
        lost: cuts after which something was missing that had been acknowledged, in words.
    """

    cuts: int = 0
    flushes: int = 0
    requests: int = 0
    syncs: int = 0
    lost: list[str] = field(default_factory=list)


def workload(
    seed: int, mode: str, tally: Tally, *, drop: int = -1, requests: int = 60, most: int = 1 << 62
) -> None:
    """One disk from its first request to its last, and cuts at every instant in between.

    Args:
        seed: of all that is random.
        mode: one of :data:`MODES`.
        tally: is added to.
        drop: the number of the sync that the host only claims to do.
        requests: how many.
        most: no more cuts than that in the tally.
    """
    chance, cutting = random.Random(seed), random.Random(seed + 1)
    oracle = Oracle()
    fd = os.memfd_create("powercut", os.MFD_CLOEXEC)
    os.write(fd, b"".join(versions[0] for versions in oracle.versions))
    file = ForgetfulFile(fd, f"seed {seed}")
    file.drop = drop
    file.honours_dsync = mode != "synced"

    def cut() -> None:
        for image in file.cuts(cutting):
            if tally.cuts >= most:
                return
            tally.cuts += 1
            if wrong := oracle.lost(image):
                tally.lost.append(f"seed {seed} {mode}, request {number}: sectors {wrong}")

    number = 0
    through = mode in ("writethrough", "synced")
    with RawDisk(file, write_back=not through) as disk:
        device = Blk(disk)
        driver = BlkDriver(device)
        file.instant = cut
        for number in range(1, requests + 1):
            if mode == "toggled" and chance.random() < 0.1:
                through = not through
                device.config_write(WRITEBACK_FIELD, b"\0" if through else b"\1")
            _one(number, chance, oracle, driver, tally, through)
            cut()
    tally.syncs = file.syncs
    tally.requests += number


def _one(
    number: int,
    chance: random.Random,
    oracle: Oracle,
    driver: BlkDriver,
    tally: Tally,
    through: bool,
) -> None:
    """One request, and what its answer promises."""
    # Each flush follows a write, so that there is something to lose.
    if number % 3 == 0:
        assert driver.flush() == S_OK
        tally.flushes += 1
        oracle.stable()
        return
    first = chance.randrange(SECTORS)
    count = chance.randint(1, min(12, SECTORS - first))
    kind = "W" if number % 3 == 1 else chance.choice("WWWZD")
    if kind == "W":
        data = [pattern(number, n) for n in range(first, first + count)]
        oracle.submitted(first, data)
        assert driver.write(first, b"".join(data)) == S_OK
    elif kind == "Z":
        # Over something else than zeros, or nobody could tell.
        first = next(n for n in range(SECTORS) if any(oracle.versions[n][-1]))
        count = min(count, SECTORS - first)
        oracle.submitted(first, [bytes(SECTOR)] * count)
        assert driver.ranges(13, (first, count, number & 1)) == S_OK
    else:
        oracle.submitted(first, [ANYTHING] * count)
        assert driver.ranges(11, (first, count, 0)) == S_OK
    if through:
        oracle.stable(first, count)


def simulate(cuts: int, seed: int) -> Tally:
    """Workloads in all modes, until there were as many cuts as asked for."""
    tally = Tally()
    turn = 0
    while tally.cuts < cuts:
        workload(seed + 2 * turn, MODES[turn % len(MODES)], tally, most=cuts)
        turn += 1
    return tally
