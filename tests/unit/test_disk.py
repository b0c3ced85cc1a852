"""Disks: raw files as they are, stable when they should be, and layers over them."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykvm.devices.disk.base import SECTOR, part, rest
from pykvm.devices.disk.host import HostFile
from pykvm.devices.disk.overlay import BLOCK, OverlayDisk
from pykvm.devices.disk.raw import RawDisk, open_raw
from tests.support.disk_io import SIZE, content, read, write

# ---- views -------------------------------------------------------------------------------------


def test_views_are_cut_anywhere() -> None:
    whole = bytes(range(30))
    views = [memoryview(whole[:7]), memoryview(whole[7:8]), memoryview(whole[8:])]
    for start in range(31):
        assert b"".join(rest(views, start)) == whole[start:]
        for length in range(31 - start):
            assert b"".join(part(views, start, length)) == whole[start : start + length]


# ---- raw ---------------------------------------------------------------------------------------


def test_reads_and_writes_are_the_files(image: Path) -> None:
    with open_raw(image) as disk:
        assert disk.sectors == SIZE // SECTOR
        assert read(disk, 1024, 512, 1, 1023) == content()[1024:2560]
        write(disk, 4096, b"a" * 512, b"b" * 1536)
        assert read(disk, 4096, 2048) == b"a" * 512 + b"b" * 1536
    data = content()
    assert image.read_bytes() == data[:4096] + b"a" * 512 + b"b" * 1536 + data[4096 + 2048 :]


def test_more_pieces_than_one_system_call_takes(image: Path) -> None:
    with open_raw(image) as disk:
        assert read(disk, 512, *([3] * 5000)) == content()[512 : 512 + 15000]
        write(disk, 0, *[bytes([n % 251]) for n in range(4096)])
        assert read(disk, 0, 4096) == bytes(n % 251 for n in range(4096))


class Halting(HostFile):
    """Does at most a few bytes at a time."""

    most = 700

    def preadv(self, views: object, offset: int) -> int:
        return super().preadv(part(views, 0, self.most), offset)  # type: ignore[arg-type]

    def pwritev(self, views: object, offset: int, sync: bool) -> int:
        return super().pwritev(part(views, 0, self.most), offset, sync)  # type: ignore[arg-type]


def test_short_reads_and_writes_are_gone_on_with(image: Path) -> None:
    with RawDisk(Halting.open(str(image))) as disk:
        assert read(disk, 512, 5000, 120) == content()[512 : 512 + 5120]
        write(disk, 1024, b"x" * 3000, b"y" * 1096)
    assert image.read_bytes()[1024 : 1024 + 4096] == b"x" * 3000 + b"y" * 1096


def test_a_host_that_takes_nothing_is_an_error_and_no_endless_loop(image: Path) -> None:
    with RawDisk(Halting.open(str(image))) as disk:
        disk.file.most = 0  # type: ignore[attr-defined]
        with pytest.raises(OSError, match="cut shorter"):
            read(disk, 0, 512)
        with pytest.raises(OSError, match="took nothing"):
            write(disk, 0, b"x" * 512)


def test_a_file_that_was_cut_shorter_is_an_error_not_zeros(image: Path) -> None:
    with open_raw(image) as disk:
        os.truncate(image, SIZE // 2)
        with pytest.raises(OSError, match="cut shorter"):
            read(disk, SIZE // 2 - 512, 1024)


def test_the_last_sector_of_an_odd_file_is_filled_up_with_zeros(image: Path) -> None:
    os.truncate(image, 1000)
    with open_raw(image) as disk:
        assert disk.sectors == 2
        assert read(disk, 512, 512) == content()[512:1000] + bytes(24)
        disk.write_zeroes(0, 1024, True)
        assert read(disk, 0, 1024) == bytes(1024)
        write(disk, 512, b"z" * 512)
        assert read(disk, 512, 512) == b"z" * 512
    assert image.stat().st_size == 1024


@pytest.mark.parametrize("unmap", [False, True])
def test_zeros_are_zeros_and_leave_their_neighbours(image: Path, unmap: bool) -> None:
    with open_raw(image) as disk:
        disk.write_zeroes(1536, 3 * 4096, unmap)
        expected = bytearray(content())
        expected[1536 : 1536 + 3 * 4096] = bytes(3 * 4096)
        assert read(disk, 0, SIZE) == expected


def test_zeros_are_written_where_the_file_system_knows_none(image: Path) -> None:
    class Old(HostFile):
        def punch(self, offset: int, length: int) -> None:
            raise OSError(errno.EOPNOTSUPP, "no")

        zero = punch

    with RawDisk(Old.open(str(image))) as disk:
        disk.write_zeroes(512, SIZE - 1024, True)
        assert read(disk, 0, SIZE) == content()[:512] + bytes(SIZE - 1024) + content()[-512:]
        disk.discard(0, 4096)
        assert not disk.can_discard
        assert read(disk, 0, 512) == content()[:512]


def test_discard_gives_space_back(image: Path) -> None:
    with open_raw(image) as disk:
        disk.flush()
        before = image.stat().st_blocks
        disk.discard(64 * 1024, 128 * 1024)
        if disk.can_discard:
            assert image.stat().st_blocks <= before - 128 * 1024 // 512
            assert read(disk, 64 * 1024, 4096) == bytes(4096)
        assert image.stat().st_size == SIZE


def test_growing_is_seen(image: Path) -> None:
    with open_raw(image) as disk:
        assert not disk.refresh()
        os.truncate(image, 2 * SIZE)
        assert disk.refresh()
        assert disk.sectors == 2 * SIZE // SECTOR
        assert read(disk, 2 * SIZE - 512, 512) == bytes(512)


def test_a_disk_is_a_file_or_a_block_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(OSError):
            open_raw(path)


def test_without_the_page_cache(tmp_path: Path) -> None:
    """Unaligned memory too, as no guest knows what the host wants."""
    folder = next((f for f in ("/var/tmp", str(tmp_path)) if takes_direct(f)), None)
    if folder is None:
        pytest.skip("open(O_DIRECT) is refused in /var/tmp and in $TMPDIR")
    path = Path(folder) / f"pykvm-direct-{os.getpid()}"
    path.write_bytes(content() + b"tail")
    try:
        with open_raw(path, cache="none") as disk:
            assert disk.limits.logical in (512, 4096)
            block = disk.limits.logical
            assert read(disk, block, 3 * block) == content()[block : 4 * block]
            odd = memoryview(bytearray(2 * block + 3))[3:]
            disk.read([odd], block)
            assert odd == content()[block : 3 * block]
            disk.write([memoryview(b"?" + b"w" * 2 * block)[1:]], 0)
            disk.flush()
            disk.write_zeroes(2 * block, block, False)
            assert read(disk, 0, 3 * block) == b"w" * 2 * block + bytes(block)
            last = SIZE // block * block
            assert read(disk, last, block)[:8] == b"tail" + bytes(4)
        assert path.read_bytes()[: 2 * block] == b"w" * 2 * block
    finally:
        path.unlink()


def takes_direct(folder: str) -> bool:
    path = f"{folder}/pykvm-direct-probe-{os.getpid()}"
    try:
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT)
    except OSError:
        return False
    finally:
        Path(path).unlink(missing_ok=True)
    os.close(fd)
    return True


# ---- stability ---------------------------------------------------------------------------------


class Watching(HostFile):
    """Writes down what is asked, and fails where it is told to."""

    def __init__(self, fd: int, path: str) -> None:
        super().__init__(fd, path)
        self.calls: list[str] = []
        self.flush_error: int | None = None

    def pwritev(self, views: object, offset: int, sync: bool) -> int:
        self.calls.append("write-sync" if sync else "write")
        return super().pwritev(views, offset, sync)  # type: ignore[arg-type]

    def fdatasync(self) -> None:
        self.calls.append("fdatasync")
        if self.flush_error is not None:
            error, self.flush_error = self.flush_error, None
            raise OSError(error, os.strerror(error))
        super().fdatasync()

    def punch(self, offset: int, length: int) -> None:
        self.calls.append("punch")
        super().punch(offset, length)


@pytest.fixture
def watched(image: Path) -> Iterator[tuple[RawDisk, Watching]]:
    file = Watching.open(str(image))
    with RawDisk(file) as disk:
        yield disk, file


Watched = tuple[RawDisk, Watching]


def test_write_back_is_stable_at_the_flush(watched: Watched) -> None:
    disk, file = watched
    write(disk, 0, b"a" * 512)
    disk.discard(4096, 4096)
    disk.flush()
    assert file.calls == ["write", "punch", "fdatasync"]


def test_write_through_is_stable_at_once(watched: Watched) -> None:
    disk, file = watched
    disk.write_back = False
    write(disk, 0, b"a" * 512)
    disk.discard(4096, 4096)
    disk.write_zeroes(8192, 4096, True)
    assert file.calls == ["write-sync", "punch", "punch", "fdatasync"]


def test_a_failed_flush_is_never_tried_again(watched: Watched) -> None:
    disk, file = watched
    write(disk, 0, b"a" * 512)
    file.flush_error = errno.EIO
    with pytest.raises(OSError):
        disk.flush()
    for _ in range(3):
        with pytest.raises(OSError, match="an earlier flush failed"):
            disk.flush()
    assert file.calls == ["write", "fdatasync"]
    assert disk.failed is not None
    assert read(disk, 0, 512) == b"a" * 512


def test_no_error_of_a_volatile_write_is_lost_by_going_over_to_write_through(
    watched: Watched,
) -> None:
    disk, file = watched
    write(disk, 0, b"a" * 512)
    file.flush_error = errno.ENOSPC
    disk.write_back = False
    assert file.calls == ["write", "fdatasync"]
    with pytest.raises(OSError, match="an earlier flush failed"):
        disk.flush()


def test_where_a_write_cannot_be_synced_itself_the_file_is(watched: Watched) -> None:
    disk, file = watched
    disk.write_back = file.honours_dsync = False
    write(disk, 0, b"a" * 512)
    write(disk, 0, b"b" * 512)
    assert file.calls == ["write", "fdatasync"] * 2


# ---- overlay -----------------------------------------------------------------------------------


@pytest.fixture
def overlay(image: Path) -> Iterator[OverlayDisk]:
    with OverlayDisk(open_raw(image, readonly=True)) as disk:
        yield disk


def test_an_overlay_takes_what_is_written_and_the_base_does_not(
    overlay: OverlayDisk, image: Path
) -> None:
    write(overlay, 1024, b"n" * 512)
    overlay.flush()
    expected = bytearray(content())
    expected[1024:1536] = b"n" * 512
    assert read(overlay, 0, 100, SIZE - 100) == expected
    assert overlay.written == BLOCK
    assert image.read_bytes() == content()


@pytest.mark.parametrize("size", [SIZE, SIZE - 512, SIZE - 1000, 512])
def test_an_overlay_behaves_as_a_plain_disk_does(tmp_path: Path, size: int) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(content(size))
    random_ = random.Random(size)
    sectors = -(-size // SECTOR)
    expected = bytearray(content(size) + bytes(sectors * SECTOR - size))
    with OverlayDisk(open_raw(path, readonly=True)) as disk:
        assert disk.sectors == sectors
        for step in range(300):
            first = random_.randrange(sectors)
            count = random_.randint(1, min(40, sectors - first))
            start, length = first * SECTOR, count * SECTOR
            match random_.randrange(4):
                case 0:
                    data = random_.randbytes(length)
                    cut = random_.randint(1, length - 1)
                    write(disk, start, data[:cut], data[cut:])
                    expected[start : start + length] = data
                case 1:
                    disk.write_zeroes(start, length, bool(step & 1))
                    expected[start : start + length] = bytes(length)
                case 2:
                    disk.discard(start, length)
                    # Whole blocks are gone, the rest may be anything; take it over as it is.
                    got = read(disk, start, length)
                    old = expected[start : start + length]
                    for at in range(0, length, SECTOR):
                        assert got[at : at + SECTOR] in (old[at : at + SECTOR], bytes(SECTOR))
                    expected[start : start + length] = got
                case _:
                    cut = random_.randint(1, length - 1)
                    got = read(disk, start, cut, length - cut)
                    assert got == expected[start : start + length]
        assert read(disk, 0, sectors * SECTOR) == expected
    assert path.read_bytes() == content(size)


def test_a_discarded_block_of_an_overlay_does_not_show_the_base_again(
    overlay: OverlayDisk,
) -> None:
    overlay.discard(0, 2 * BLOCK)
    assert read(overlay, 0, 3 * BLOCK) == bytes(2 * BLOCK) + content()[2 * BLOCK : 3 * BLOCK]


def test_an_overlay_grows_with_its_base(image: Path) -> None:
    os.truncate(image, SIZE - 512)
    with OverlayDisk(open_raw(image, readonly=True)) as disk:
        write(disk, SIZE - BLOCK, b"o" * (BLOCK - 512))
        with image.open("ab") as file:
            file.write(b"g" * (512 + BLOCK))
        assert disk.refresh()
        assert read(disk, SIZE - BLOCK, 2 * BLOCK) == b"o" * (BLOCK - 512) + b"g" * (512 + BLOCK)
        os.truncate(image, SIZE // 2)
        assert not disk.refresh()
        with pytest.raises(OSError, match="cut shorter"):
            read(disk, SIZE // 2, 512)


def test_an_overlay_leaves_nothing_behind(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with OverlayDisk(open_raw(image, readonly=True)) as disk:
        write(disk, 0, b"x" * BLOCK)
        assert list(folder.iterdir()) == []
