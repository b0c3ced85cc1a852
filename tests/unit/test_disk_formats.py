"""Disks of other formats, which QEMU's tools serve, and block devices."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykvm.devices.disk.base import SECTOR
from pykvm.devices.disk.foreign import looks_like
from pykvm.devices.disk.raw import RawDisk, open_raw
from pykvm.devices.disk.spec import DiskSpec
from pykvm.errors import DiskError
from tests.support.disk_io import SIZE, another_process, content, read, write
from tests.support.waiting import until

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
    writes = (
        "from pykvm.devices.disk.spec import DiskSpec;"
        "disk = DiskSpec(sys.argv[1], format='qcow2').open();"
        "disk.write([memoryview(b'k' * 4096)], 0)"
    )
    with another_process(writes, path):
        pass

    def free() -> bool:
        try:
            with DiskSpec(path, format="qcow2").open() as disk:
                return read(disk, 0, 4096) == b"k" * 4096
        except DiskError:
            return False

    until("the image is free again", free)
    assert free()


# ---- block devices -----------------------------------------------------------------------------


@pytest.fixture
def block_device(image: Path) -> Iterator[str]:
    """A loop device over the image."""
    losetup = shutil.which("losetup", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if losetup is None:
        pytest.skip("no losetup in $PATH")
    done = subprocess.run(
        [losetup, "--find", "--show", image],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    if done.returncode:
        pytest.skip(f"losetup: {done.stderr.strip()}")
    device = done.stdout.strip()
    yield device
    subprocess.run([losetup, "--detach", device], check=True, timeout=100)


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
    subprocess.run(
        ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, path],
        check=True,
        timeout=100,
    )
    for mode in (",ro", ",overlay", ""):
        with DiskSpec.parse(f"{path},format=qcow2{mode}").open() as disk:
            assert read(disk, 0, SIZE) == content()
            if not disk.readonly:
                write(disk, 512, b"q" * 512)
                disk.flush()
                assert read(disk, 0, 1536) == content()[:512] + b"q" * 512 + content()[1024:1536]
    subprocess.run(["qemu-img", "check", "-q", path], check=True, timeout=100)


def test_fuse_is_not_trusted_with_a_synced_write(tmp_path: Path) -> None:
    needs_fuse()
    path = tmp_path / "a.qcow2"
    path.write_bytes(empty_qcow2(1 << 20))
    with DiskSpec(path, format="qcow2", cache="writethrough").open() as disk:
        assert isinstance(disk, RawDisk) and not disk.file.honours_dsync
        write(disk, 0, b"a" * 512)
