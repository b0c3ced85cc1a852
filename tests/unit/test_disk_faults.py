"""Hosts that fail: the guest is told, the disk goes on, nothing acknowledged is lost."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pykvm.devices.disk.overlay import OverlayDisk
from pykvm.devices.disk.raw import RawDisk, open_raw
from pykvm.devices.virtio.blk import Blk
from pykvm.devices.virtio.blk_request import S_IOERR, S_OK
from tests.support import blk_workload
from tests.support.chains import BlkDriver
from tests.support.faulty_file import FaultyFile

INITIAL = random.Random(7).randbytes(blk_workload.SECTORS * 512)
MODES = ("writeback", "writethrough", "overlay base", "overlay layer")
ERRORS = (errno.EIO, errno.ENOSPC)
SHORTS = (1, 700, 4096)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "disk.img"


@pytest.fixture
def fast_image() -> Iterator[Path]:
    """In memory where that is possible, as it is made anew for every system call."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as made:
        yield Path(made, "disk.img")


def served(
    image: Path, mode: str, at: int, error: int = 0, most: int = 0
) -> tuple[blk_workload.Outcome, FaultyFile]:
    """The workload on a fresh image, with system call number ``at`` of it going wrong."""
    image.write_bytes(INITIAL)
    faulty = FaultyFile.open(str(image))
    disk: RawDisk | OverlayDisk
    if mode == "overlay base":
        disk = OverlayDisk(RawDisk(faulty, readonly=True))
    elif mode == "overlay layer":
        faulty.close()
        faulty = FaultyFile.temporary(str(image.parent), len(INITIAL))
        disk = OverlayDisk(open_raw(image, readonly=True), faulty)
    else:
        disk = RawDisk(faulty, write_back=mode == "writeback")
    faulty.at, faulty.error, faulty.most = at, error, most
    with disk:
        return blk_workload.run(Blk(disk), INITIAL), faulty


@pytest.mark.parametrize("mode", MODES)
def test_without_a_fault_no_request_fails(fast_image: Path, mode: str) -> None:
    outcome, faulty = served(fast_image, mode, -1)
    assert not outcome.errors and not outcome.wrong
    assert {"writeback": "fdatasync", "writethrough": "write"}.get(mode, "read") in faulty.calls


@pytest.mark.parametrize("error", ERRORS, ids=lambda number: errno.errorcode[number])
@pytest.mark.parametrize("mode", MODES)
def test_every_system_call_may_fail(fast_image: Path, mode: str, error: int) -> None:
    calls = len(served(fast_image, mode, -1)[1].calls)
    assert calls > 30 or mode == "overlay base"
    for at in range(calls):
        outcome, faulty = served(fast_image, mode, at, error)
        where = f"call {at} ({faulty.hit})"
        assert not outcome.wrong, f"{where}: {outcome.wrong}"
        assert outcome.errors, f"{where} failed, and no request was told"
        if faulty.hit == "fdatasync":
            # Sticky, and not tried again.
            first = outcome.failed[0]
            later = [status for number, status in outcome.flushes if number > first]
            assert set(later) <= {S_IOERR}, where
            assert faulty.calls.count("fdatasync") == faulty.calls[: at + 1].count("fdatasync")
        else:
            assert outcome.errors == 1, where


@pytest.mark.parametrize("most", SHORTS)
@pytest.mark.parametrize("mode", MODES)
def test_every_system_call_may_do_less_than_asked(fast_image: Path, mode: str, most: int) -> None:
    calls = served(fast_image, mode, -1)[1].calls
    for at, name in enumerate(calls):
        if name in ("read", "write"):
            outcome, _ = served(fast_image, mode, at, most=most)
            assert not outcome.wrong and not outcome.errors, f"call {at} ({name})"


def test_a_host_that_does_nothing_at_all_is_an_error(fast_image: Path) -> None:
    calls = served(fast_image, "writeback", -1)[1].calls
    for at, name in enumerate(calls):
        if name in ("read", "write"):
            outcome, _ = served(fast_image, "writeback", at, most=0)
            assert not outcome.wrong and outcome.errors == 1, f"call {at} ({name})"


def test_the_model_would_see_a_lost_write(fast_image: Path) -> None:
    class Lying(RawDisk):
        def write(self, views: object, offset: int) -> None:
            pass

    fast_image.write_bytes(INITIAL)
    with Lying(FaultyFile.open(str(fast_image))) as disk:
        assert blk_workload.run(Blk(disk), INITIAL).wrong


# ---- the real thing ----------------------------------------------------------------------------


@pytest.fixture
def small_volume(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 8 MiB, mounted from a file."""
    for tool in ("mke2fs", "mount", "umount"):
        if shutil.which(tool, path=f"{os.environ['PATH']}:/sbin:/usr/sbin") is None:
            pytest.skip(f"no {tool} in $PATH")
    volume, folder = tmp_path / "volume", tmp_path / "mounted"
    with volume.open("xb") as file:
        file.truncate(8 << 20)
    folder.mkdir()
    path = {"PATH": f"{os.environ['PATH']}:/sbin:/usr/sbin"}
    subprocess.run(["mke2fs", "-q", "-t", "ext4", volume], check=True, env=path, timeout=100)
    done = subprocess.run(
        ["mount", "-o", "loop", volume, folder],
        capture_output=True,
        text=True,
        env=path,
        timeout=100,
    )
    if done.returncode:
        pytest.skip(f"mount -o loop: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True, env=path, timeout=100)


def test_a_full_host_is_an_io_error_and_room_helps(small_volume: Path) -> None:
    image = small_volume / "disk.img"
    with image.open("xb") as file:
        file.truncate(64 << 20)
    megabyte = 2048
    with open_raw(image) as disk:
        driver = BlkDriver(Blk(disk))
        statuses = []
        for number in range(16):
            data = bytes([number + 1]) * (1 << 20)
            statuses.append(driver.write(number * megabyte, data))
        assert statuses[0] == S_OK and statuses[-1] == S_IOERR
        kept = [number for number, status in enumerate(statuses) if status == S_OK]
        assert len(kept) <= 8
        for number in kept:
            assert driver.read(number * megabyte, 4096) == (S_OK, bytes([number + 1]) * 4096)
        assert driver.flush() == S_OK
        # The guest itself can make room.
        for number in kept[:2]:
            assert driver.ranges(11, (number * megabyte, megabyte, 0)) == S_OK
        assert driver.write(40 * megabyte, b"r" * (1 << 20)) == S_OK
        assert driver.flush() == S_OK
        assert driver.errors == statuses.count(S_IOERR)


def strace(image: Path, inject: str, mode: str = "") -> dict[str, Any]:
    """The workload in a process of its own, some of its system calls failed by strace."""
    if shutil.which("strace") is None:
        pytest.skip("no strace in $PATH")
    done = subprocess.run(
        ["strace", "-f", "-qq", "-o", image.with_suffix(".trace"), "-P", image, "-e", inject,
         sys.executable, "-m", "tests.support.blk_workload", image, *([mode] if mode else [])],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        timeout=100,
    )  # fmt: skip
    if done.returncode and "ptrace" in done.stderr.lower():
        pytest.skip(f"strace: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("calls", "error", "when", "mode"),
    [
        ("preadv,preadv2", "EIO", "3", ""),
        ("pwritev,pwritev2", "ENOSPC", "5", ""),
        ("pwritev,pwritev2", "EIO", "2+3", "cache=writethrough"),
        ("fdatasync", "EIO", "2", ""),
        ("fallocate", "ENOSPC", "1", ""),
        ("fallocate", "EOPNOTSUPP", "1+", ""),
    ],
)
def test_the_kernels_own_errors(image: Path, calls: str, error: str, when: str, mode: str) -> None:
    image.write_bytes(INITIAL)
    outcome = strace(image, f"inject={calls}:error={error}:when={when}", mode)
    injected = image.with_suffix(".trace").read_text().count("(INJECTED)")
    assert injected and outcome["wrong"] == []
    if calls == "fdatasync":
        assert injected == 1
        statuses = [status for _, status in outcome["flushes"]]
        good = statuses.index(S_IOERR)
        assert good and set(statuses[good:]) == {S_IOERR} and len(statuses) > good + 2
    elif error == "EOPNOTSUPP":
        assert outcome["errors"] == 0
    else:
        assert outcome["errors"] == injected
