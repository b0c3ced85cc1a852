"""Power cuts and kills: what was acknowledged is there; and the search finds it where it is not."""

from __future__ import annotations

import random
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pykvm.devices.disk.raw import RawDisk, open_raw
from pykvm.devices.virtio.blk import Blk
from pykvm.devices.virtio.blk_request import S_OK
from tests.powercut.simulate import MODES, Tally, simulate, workload
from tests.support.chains import BlkDriver
from tests.support.waiting import PATIENCE, read

# ---- power -------------------------------------------------------------------------------------


def test_what_was_flushed_is_there_after_any_cut() -> None:
    tally = simulate(10_000, seed=1)
    assert tally.cuts == 10_000 and tally.flushes > 100
    assert not tally.lost


@pytest.mark.parametrize("mode", MODES)
def test_without_any_one_sync_something_is_lost(mode: str) -> None:
    whole = Tally()
    workload(1, mode, whole)
    assert whole.syncs >= 20 and not whole.lost
    for drop in range(whole.syncs):
        tally = Tally()
        workload(1, mode, tally, drop=drop)
        assert tally.lost, f"sync {drop} of {whole.syncs} was left out, and nobody noticed"


def _no_flush(disk: RawDisk) -> None:
    pass


def _unnoticed(disk: RawDisk, views: Sequence[memoryview], offset: int) -> None:
    disk.file.pwritev(views, offset, not disk._write_back)


def _never_sync(disk: RawDisk, views: Sequence[memoryview], offset: int) -> None:
    disk._volatile = True
    disk.file.pwritev(views, offset, False)


def _lazy_zeroes(disk: RawDisk, offset: int, length: int, unmap: bool) -> None:
    disk.file.punch(offset, length)


@pytest.mark.parametrize(
    ("method", "broken"),
    [
        ("flush", _no_flush),
        ("write", _unnoticed),
        ("write", _never_sync),
        ("write_zeroes", _lazy_zeroes),
    ],
)
def test_a_disk_that_forgets_to_sync_is_found(
    monkeypatch: pytest.MonkeyPatch, method: str, broken: Callable[..., None]
) -> None:
    monkeypatch.setattr(RawDisk, method, broken)
    assert simulate(3000, seed=1).lost


def test_the_program_says_what_it_did_and_fails_where_something_is_lost() -> None:
    def run(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
            timeout=PATIENCE,
        )

    start = (
        "import runpy, sys; sys.argv[1:] = ['--cuts', '500', '--seed', '3'];"
        "from pykvm.devices.disk.raw import RawDisk; {}"
        "runpy.run_module('tests.powercut', run_name='__main__')"
    )
    done = run(start.format(""))
    assert done.returncode == 0 and "seed 3: 500 power cuts" in done.stdout, done.stderr
    assert ", 0 lost" in done.stdout
    done = run(start.format("RawDisk.flush = lambda disk: None;"))
    assert done.returncode == 1 and "lost: seed 3 writeback, request" in done.stdout


# ---- kills -------------------------------------------------------------------------------------

CHILD = """
import os, struct, sys
from tests.unit.test_powercut import request, serve
from pykvm.devices.disk.raw import open_raw
from pykvm.devices.virtio.blk import Blk
from tests.support.chains import BlkDriver
disk = open_raw(sys.argv[1])
driver = BlkDriver(Blk(disk))
print("up", flush=True)
for number in range(1 << 30):
    serve(driver, *request(int(sys.argv[2]), number))
    os.write(1, struct.pack("<I", number))
"""
SECTORS = 4096


def request(seed: int, number: int) -> tuple[int, int, bytes]:
    """Request ``number``: what is to be done, where, with what data."""
    chance = random.Random(f"{seed} {number}")
    first = chance.randrange(SECTORS)
    count = chance.randint(1, min(256, SECTORS - first))
    return chance.choice((1, 1, 1, 13)), first, chance.randbytes(count * 512)


def serve(driver: BlkDriver, kind: int, first: int, data: bytes) -> None:
    if kind == 1:
        assert driver.write(first, data) == S_OK
    else:
        assert driver.ranges(13, (first, len(data) // 512, 1)) == S_OK


@pytest.mark.parametrize("seed", range(6))
def test_a_kill_loses_nothing_that_was_answered(tmp_path: Path, seed: int) -> None:
    image = tmp_path / "disk.img"
    with image.open("xb") as file:
        file.truncate(SECTORS * 512)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(image), str(seed)],
        stdout=subprocess.PIPE,
        bufsize=0,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert child.stdout is not None
    with child:
        try:
            assert read(child.stdout, 3) == b"up\n"
            answers = read(child.stdout, 4 * random.Random(seed).randint(1, 200))
        finally:
            child.kill()
        answers += read(child.stdout, 1 << 20)
        child.wait(PATIENCE)
    assert child.returncode == -signal.SIGKILL
    answered = len(answers) // 4
    assert answers == struct.pack(f"<{answered}I", *range(answered))
    check(image.read_bytes(), seed, answered)
    with open_raw(image) as disk:  # the lock died with it
        assert BlkDriver(Blk(disk)).read(0, 512)[0] == S_OK


def check(got: bytes, seed: int, answered: int) -> None:
    """The image has what was answered, in its order; of the next request any part; nothing else."""
    expected = bytearray(SECTORS * 512)
    for number in range(answered + 1):
        kind, first, data = request(seed, number)
        new = data if kind == 1 else bytes(len(data))
        at, end = first * 512, first * 512 + len(new)
        if number == answered:
            # Bare truths: pytest would go through a difference of images line by line.
            same_before, same_after = got[:at] == expected[:at], got[end:] == expected[end:]
            assert len(got) == len(expected) and same_before and same_after
            old = expected[at:end]
            for n, byte in enumerate(got[at:end]):
                assert byte in (old[n], new[n])
        expected[at:end] = new


def test_the_check_after_a_kill_would_see_a_lost_request(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SECTORS * 512))
    with open_raw(image) as disk:
        driver = BlkDriver(Blk(disk))
        for number in range(10):
            if number != 7:
                serve(driver, *request(0, number))
    with pytest.raises(AssertionError):
        check(image.read_bytes(), 0, 10)
