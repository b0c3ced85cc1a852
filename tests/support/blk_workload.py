"""Requests to a block device, and what has to come of them whatever the host does.

Run as a program it serves the workload from an image and prints what came of it, so that a tracer
can make its system calls fail: ``python -m tests.support.blk_workload IMAGE [MODE]``.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass, field

from pykvm.devices.virtio.blk import Blk
from pykvm.devices.virtio.blk_request import S_IOERR, S_OK
from tests.support.chains import BlkDriver

SECTORS = 128
REQUESTS = 60


@dataclass
class Outcome:
    """What came of the requests.

    Attributes:
        failed: numbers of those of the workload's own requests that were answered with an error.
        errors: how many requests were answered with an error.
        flushes: (number, status) of the flushes.
        wrong: what must not be, in words.
    """

    errors: int = 0
    failed: list[int] = field(default_factory=list)
    flushes: list[tuple[int, int]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def run(device: Blk, initial: bytes, seed: int = 1) -> Outcome:
    """Send requests and compare with a model, in which a failed write leaves what it touched open.

    A request that failed may have been done, in part, or not at all; everything else is exact.
    """
    outcome = Outcome()
    driver = BlkDriver(device)
    chance = random.Random(seed)
    model = [initial[n * 512 : n * 512 + 512] for n in range(SECTORS)]
    either: list[bytes | None] = [None] * SECTORS  # None: known; else what it may be as well
    for number in range(REQUESTS):
        kind = chance.choice("RRRWWWWFFDZ")
        first = chance.randrange(SECTORS)
        count = chance.randint(1, min(24, SECTORS - first))
        data = chance.randbytes(count * 512)
        if kind == "R":
            pieces = [bytearray(512), bytearray(count * 512 - 512)]
            status = driver.request(0, first, into=pieces)
            if status == S_OK:
                _compare(outcome, number, model, either, first, b"".join(pieces))
        elif kind == "F":
            status = driver.flush()
            outcome.flushes.append((number, status))
        else:
            after = data if kind == "W" else bytes(count * 512)
            if kind == "W":
                cut = 512 * chance.randint(0, count)
                status = driver.request(1, first, out=[data[:cut], data[cut:]])
            elif kind == "D":
                status = driver.ranges(11, (first, count, 0))
            else:
                status = driver.ranges(13, (first, count, chance.randint(0, 1)))
            for n in range(first, first + count):
                new = after[(n - first) * 512 : (n - first) * 512 + 512]
                if status == S_OK and kind != "D":
                    model[n], either[n] = new, None
                else:  # a discarded sector may keep what it had
                    either[n] = new
            if kind == "D" or status != S_OK:
                # One request more, to know again what is there.
                _settle(driver, model, either, first, count)
        if status not in (S_OK, S_IOERR):
            outcome.wrong.append(f"request {number} ({kind}): status {status}")
        if status != S_OK:
            outcome.failed.append(number)
    outcome.errors = driver.errors
    return outcome


def _compare(
    outcome: Outcome,
    number: int,
    model: list[bytes],
    either: list[bytes | None],
    first: int,
    got: bytes,
) -> None:
    for n in range(first, first + len(got) // 512):
        sector = got[(n - first) * 512 : (n - first) * 512 + 512]
        if either[n] is not None and _torn(sector, model[n], either[n] or b""):
            model[n], either[n] = sector, None
        if sector != model[n]:
            outcome.wrong.append(f"request {number}: sector {n} is not what was written")


def _torn(sector: bytes, before: bytes, after: bytes) -> bool:
    """Whether every byte of the sector is the old one's or the new one's."""
    return all(
        byte in pair for byte, pair in zip(sector, zip(before, after, strict=True), strict=True)
    )


def _settle(
    driver: BlkDriver, model: list[bytes], either: list[bytes | None], first: int, count: int
) -> None:
    """See what is there now after a request whose effect is open."""
    status, got = driver.read(first, count * 512)
    if status != S_OK:
        return
    for n in range(first, first + count):
        sector = got[(n - first) * 512 : (n - first) * 512 + 512]
        if _torn(sector, model[n], either[n] or model[n]):
            model[n], either[n] = sector, None


def main(image: str, mode: str = "") -> None:
    from pykvm.devices.disk.spec import DiskSpec

    with open(image, "rb") as file:
        initial = file.read()
    spec = DiskSpec.parse(f"{image},format=raw{',' + mode if mode else ''}")
    with spec.open() as disk:
        outcome = run(Blk(disk), initial)
        print(json.dumps(vars(outcome)))


if __name__ == "__main__":
    main(*sys.argv[1:])
