"""Disks: raw files as they are, layers over them, locks between their users."""

from __future__ import annotations

import errno
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pykvm.devices.disk.base import SECTOR, Disk, part, rest
from pykvm.devices.disk.foreign import looks_like
from pykvm.devices.disk.host import HostFile
from pykvm.devices.disk.overlay import BLOCK, OverlayDisk
from pykvm.devices.disk.raw import RawDisk, open_raw
from pykvm.devices.disk.spec import DiskSpec
from pykvm.errors import DiskError

SIZE = 256 * 1024


def content(size: int = SIZE, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(content())
    return path


def read(disk: Disk, offset: int, *sizes: int) -> bytes:
    pieces = [bytearray(b"\xaa" * size) for size in sizes]
    disk.read([memoryview(piece) for piece in pieces], offset)
    return b"".join(pieces)


def write(disk: Disk, offset: int, *pieces: bytes) -> None:
    disk.write([memoryview(piece) for piece in pieces], offset)


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


# ---- locks -------------------------------------------------------------------------------------


def test_a_second_writer_is_told_who_has_the_disk(image: Path) -> None:
    with open_raw(image):
        for readonly in (False, True):
            with pytest.raises(DiskError, match="this process"):
                open_raw(image, readonly=readonly)
    open_raw(image).close()


def test_readers_share_and_keep_writers_out(image: Path) -> None:
    with (
        open_raw(image, readonly=True),
        open_raw(image, readonly=True),
        pytest.raises(DiskError, match="this process"),
    ):
        open_raw(image)
    open_raw(image).close()


def test_another_process_is_named(image: Path) -> None:
    script = (
        "import sys; from pykvm.devices.disk.raw import open_raw; disk = open_raw(sys.argv[1]);"
        "print('up', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdin is not None and child.stdout is not None
    with child:
        assert child.stdout.readline() == b"up\n"
        with pytest.raises(DiskError, match=f"process {child.pid} \\("):
            open_raw(image)
        child.kill()
    open_raw(image).close()


def daemon(image: Path, folder: Path, *, writable: bool) -> subprocess.Popen[bytes]:
    """QEMU's storage daemon with the image open; it is up when it has written its number."""
    if shutil.which("qemu-storage-daemon") is None:
        pytest.skip("no qemu-storage-daemon in $PATH")
    only = "off" if writable else "on"
    socket = folder / "nbd"
    return subprocess.Popen(
        [
            "qemu-storage-daemon",
            "--blockdev", f"driver=file,node-name=d,filename={image},read-only={only}",
            "--nbd-server", f"addr.type=unix,addr.path={socket}",
            "--export", f"type=nbd,id=e,node-name=d,writable={'on' if writable else 'off'}",
            "--pidfile", str(folder / "pid"),
        ],
        stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_until(condition: Callable[[], bool]) -> None:
    import time

    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("readonly", [False, True])
def test_qemu_does_not_open_what_we_have_open(image: Path, tmp_path: Path, readonly: bool) -> None:
    with open_raw(image, readonly=readonly), daemon(image, tmp_path, writable=True) as process:
        _, said = process.communicate(timeout=30)
        assert process.returncode and b"lock" in said, said


@pytest.mark.parametrize("readonly", [False, True])
def test_we_do_not_open_what_qemu_writes(image: Path, tmp_path: Path, readonly: bool) -> None:
    with daemon(image, tmp_path, writable=True) as process:
        wait_until((tmp_path / "pid").exists)
        with pytest.raises(DiskError, match=f"process {process.pid} \\(qemu-storage"):
            open_raw(image, readonly=readonly)
        process.terminate()


def test_readers_share_with_qemus_readers(image: Path, tmp_path: Path) -> None:
    with daemon(image, tmp_path, writable=False) as process:
        wait_until((tmp_path / "pid").exists)
        open_raw(image, readonly=True).close()
        with pytest.raises(DiskError):
            open_raw(image)
        process.terminate()


# ---- what is meant -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "again"),
    [
        ("a.img", "a.img"),
        ("a.img,ro", "a.img,ro"),
        ("a,,b.img,overlay,serial=x,,y", "a,,b.img,overlay,serial=x,,y"),
        ("/d/a,cache=none,format=raw", "/d/a,cache=none,format=raw"),
        ("a,format=qcow2,cache=writethrough", "a,cache=writethrough,format=qcow2"),
    ],
)
def test_a_disk_is_read_as_it_is_written(text: str, again: str) -> None:
    spec = DiskSpec.parse(text)
    assert str(spec) == again
    assert str(DiskSpec.parse(again)) == again


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "needs a path"),
        (",ro", "needs a path"),
        ("a,r0", "'r0' in 'a,r0' is not understood: PATH"),
        ("a,ro=1", "'ro=1'"),
        ("a,cache", "'cache'"),
        ("a,cache=", "'cache='"),
        ("a,", "not understood"),
        ("a,cache=unsafe", "one of writeback, writethrough, none"),
        ("a,format=iso", "one of raw, qcow2"),
        ("a,ro,overlay", "either ro"),
        ("a,ro,ro", "ro stands twice"),
        ("a,overlay,cache=none", "nothing written to an overlay stays"),
        ("a,serial=123456789012345678901", "at most 20"),
        ("a,serial=ä", "ASCII"),
    ],
)
def test_a_wrong_disk_is_refused_in_words(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint.replace("(", "\\(")):
        DiskSpec.parse(text)


def test_what_looks_like_another_format_is_asked_about(image: Path) -> None:
    image.write_bytes(b"QFI\xfb" + bytes(1020))
    with pytest.raises(
        DiskError, match="looks like a qcow2 image: say format=qcow2, or format=raw"
    ):
        DiskSpec(image).open()
    with DiskSpec(image, format="raw").open() as disk:
        assert read(disk, 0, 4) == b"QFI\xfb"


def test_a_disk_opens_as_meant(image: Path) -> None:
    with DiskSpec.parse(f"{image},overlay").open() as disk:
        assert isinstance(disk, OverlayDisk) and not disk.readonly
        write(disk, 0, b"x" * 512)
    with DiskSpec.parse(f"{image},ro").open() as disk:
        assert disk.readonly and not disk.can_discard
    with DiskSpec.parse(f"{image},cache=writethrough").open() as disk:
        assert not disk.write_back
    assert image.read_bytes() == content()


# ---- other formats -----------------------------------------------------------------------------


def test_formats_are_recognized() -> None:
    assert looks_like(b"QFI\xfb\0\0\0\3") == "qcow2"
    assert looks_like(bytes(64) + b"\x7f\x10\xda\xbe") == "vdi"
    assert looks_like(bytes(512)) == ""


def test_a_missing_tool_is_named(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(DiskError, match=r"opened by qemu-storage-daemon .* apt install"):
        DiskSpec(image, format="qcow2").open()
    with pytest.raises(DiskError, match=r"or qemu-img .* apt install qemu-utils"):
        DiskSpec(image, format="qcow2", overlay=True).open()


def empty_qcow2(size: int) -> bytes:
    """An empty qcow2 image, version 2: header, refcounts of its four clusters, an L1 table.

    Source: QEMU's docs/interop/qcow2.txt.
    """
    cluster = 1 << 16
    header = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 0, 0, 16, size, 0, 1, 3 * cluster, cluster, 1, 0, 0
    )
    table = struct.pack(">Q", 2 * cluster)
    counts = struct.pack(">4H", 1, 1, 1, 1)
    return b"".join(part.ljust(cluster, b"\0") for part in (header, table, counts, b""))


def needs_fuse() -> None:
    if shutil.which("qemu-storage-daemon") is None:
        pytest.skip("no qemu-storage-daemon in $PATH")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("open(/dev/fuse) is refused")


def test_a_qcow2_image_is_written_through_qemus_daemon(tmp_path: Path) -> None:
    needs_fuse()
    path = tmp_path / "a,b.qcow2"
    path.write_bytes(empty_qcow2(1 << 20))
    spec = DiskSpec(path, format="qcow2")
    with spec.open() as disk:
        assert disk.sectors == (1 << 20) // SECTOR
        write(disk, 65536, content(4096))
        disk.flush()
        with pytest.raises(DiskError, match="lock"):
            spec.open()
        disk.discard(0, 65536)
    assert content(4096) in path.read_bytes()
    with DiskSpec(path, format="qcow2", readonly=True).open() as disk:
        assert read(disk, 65536 - 512, 512 + 4096) == bytes(512) + content(4096)
    with DiskSpec(path, format="qcow2", overlay=True).open() as disk:
        before = path.read_bytes()
        write(disk, 0, b"x" * 4096)
        assert read(disk, 0, 4096) == b"x" * 4096
        assert path.read_bytes() == before


def test_an_image_that_qemu_refuses_is_refused_with_its_words(image: Path) -> None:
    needs_fuse()
    with pytest.raises(DiskError, match=r"qemu-storage-daemon: .*qcow2"):
        DiskSpec(image, format="qcow2").open()


def test_the_daemon_ends_when_its_user_is_killed(tmp_path: Path) -> None:
    needs_fuse()
    path = tmp_path / "a.qcow2"
    path.write_bytes(empty_qcow2(1 << 20))
    script = (
        "import sys; from pykvm.devices.disk.spec import DiskSpec;"
        "disk = DiskSpec(sys.argv[1], format='qcow2').open();"
        "disk.write([memoryview(b'k' * 4096)], 0); print('up', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdin is not None and child.stdout is not None
    with child:
        assert child.stdout.readline() == b"up\n"
        child.kill()

    def free() -> bool:
        try:
            with DiskSpec(path, format="qcow2").open() as disk:
                return read(disk, 0, 4096) == b"k" * 4096
        except DiskError:
            return False

    wait_until(free)


# ---- block devices -----------------------------------------------------------------------------


@pytest.fixture
def block_device(image: Path) -> Iterator[str]:
    """A loop device over the image."""
    losetup = shutil.which("losetup", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if losetup is None:
        pytest.skip("no losetup in $PATH")
    done = subprocess.run(
        [losetup, "--find", "--show", image], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"losetup: {done.stderr.strip()}")
    device = done.stdout.strip()
    yield device
    subprocess.run([losetup, "--detach", device], check=True)


@pytest.mark.parametrize("cache", ["writeback", "writethrough", "none"])
def test_a_block_device_is_a_disk(block_device: str, cache: str) -> None:
    with open_raw(block_device, cache=cache) as disk:
        assert disk.sectors == SIZE // SECTOR
        assert disk.limits.logical in (512, 4096)
        assert read(disk, 4096, 4096, 8192) == content()[4096 : 4096 + 12288]
        write(disk, 8192, b"d" * 4096)
        disk.flush()
        assert read(disk, 8192, 4096) == b"d" * 4096
        disk.write_zeroes(16384, 8192, False)
        disk.write_zeroes(32768, 8192, True)
        assert (
            read(disk, 16384 - 4096, 16384)
            == content()[12288:16384] + bytes(8192) + content()[24576:28672]
        )
        assert read(disk, 32768, 8192) == bytes(8192)
        disk.discard(65536, 65536)
        if disk.can_discard:
            assert read(disk, 65536, 65536) == bytes(65536)
        with pytest.raises(DiskError, match="this process"):
            open_raw(block_device)


def test_without_fuse_an_image_can_be_read_but_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tool in ("qemu-img", "qemu-storage-daemon"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} in $PATH")
    path = tmp_path / "a.qcow2"
    path.write_bytes(empty_qcow2(1 << 20))
    before = path.read_bytes()
    access = os.access
    monkeypatch.setattr(os, "access", lambda name, mode: name != "/dev/fuse" and access(name, mode))
    with DiskSpec(path, format="qcow2", overlay=True).open() as disk:
        write(disk, 4096, content(4096))
        assert read(disk, 0, 12288) == bytes(4096) + content(4096) + bytes(4096)
    assert path.read_bytes() == before
    with pytest.raises(DiskError, match=r"modprobe fuse.*qemu-img can read it, for ro or overlay"):
        DiskSpec(path, format="qcow2").open()
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(DiskError, match="not in qcow2 format"):
        DiskSpec(path, format="qcow2", readonly=True).open()


def test_a_qcow2_image_with_a_disk_in_it_is_read(tmp_path: Path) -> None:
    needs_fuse()
    if shutil.which("qemu-img") is None:
        pytest.skip("no qemu-img in $PATH")
    raw, path = tmp_path / "raw", tmp_path / "a.qcow2"
    raw.write_bytes(content())
    subprocess.run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, path], check=True)
    for mode in (",ro", ",overlay", ""):
        with DiskSpec.parse(f"{path},format=qcow2{mode}").open() as disk:
            assert read(disk, 0, SIZE) == content()
            if not disk.readonly:
                write(disk, 512, b"q" * 512)
                disk.flush()
                assert read(disk, 0, 1536) == content()[:512] + b"q" * 512 + content()[1024:1536]
    subprocess.run(["qemu-img", "check", "-q", path], check=True)


def test_where_a_write_cannot_be_synced_itself_the_file_is(watched: Watched) -> None:
    disk, file = watched
    disk.write_back = file.honours_dsync = False
    write(disk, 0, b"a" * 512)
    write(disk, 0, b"b" * 512)
    assert file.calls == ["write", "fdatasync"] * 2


def test_fuse_is_not_trusted_with_a_synced_write(tmp_path: Path) -> None:
    needs_fuse()
    path = tmp_path / "a.qcow2"
    path.write_bytes(empty_qcow2(1 << 20))
    with DiskSpec(path, format="qcow2", cache="writethrough").open() as disk:
        assert isinstance(disk, RawDisk) and not disk.file.honours_dsync
        write(disk, 0, b"a" * 512)
