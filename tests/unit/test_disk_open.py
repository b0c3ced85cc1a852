"""Disks as they are asked for, and the locks between their users."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pykvm.devices.disk.overlay import OverlayDisk
from pykvm.devices.disk.raw import open_raw
from pykvm.devices.disk.spec import DiskSpec
from pykvm.errors import DiskError
from tests.support.disk_io import another_process, content, read, write
from tests.support.waiting import until

# ---- locks -------------------------------------------------------------------------------------


def test_a_second_writer_is_told_who_has_the_disk(image: Path) -> None:
    with open_raw(image):
        for readonly in (False, True):
            with pytest.raises(DiskError, match="this process"):
                open_raw(image, readonly=readonly)
    open_raw(image).close()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_file_that_may_only_be_read_says_how(
    image: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real = os.open

    def guarded(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_RDWR:
            raise OSError(code, os.strerror(code), path)
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", guarded)  # root may write all
    words = f"{os.strerror(code)} to write it: open it with ro, or as overlay"
    with pytest.raises(OSError, match=words) as refused:
        open_raw(image)
    assert refused.value.filename == str(image)
    open_raw(image, readonly=True).close()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match=rf"{os.strerror(code)}: '"):
        open_raw(image)


def test_readers_share_and_keep_writers_out(image: Path) -> None:
    with (
        open_raw(image, readonly=True),
        open_raw(image, readonly=True),
        pytest.raises(DiskError, match="this process"),
    ):
        open_raw(image)
    open_raw(image).close()


def test_another_process_is_named(image: Path) -> None:
    opens = "from pykvm.devices.disk.raw import open_raw; disk = open_raw(sys.argv[1])"
    with (
        another_process(opens, image) as child,
        pytest.raises(DiskError, match=f"process {child.pid} \\("),
    ):
        open_raw(image)
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


@pytest.mark.parametrize("readonly", [False, True])
def test_qemu_does_not_open_what_we_have_open(image: Path, tmp_path: Path, readonly: bool) -> None:
    with open_raw(image, readonly=readonly), daemon(image, tmp_path, writable=True) as process:
        _, said = process.communicate(timeout=30)
        assert process.returncode and b"lock" in said, said


@pytest.mark.parametrize("readonly", [False, True])
def test_we_do_not_open_what_qemu_writes(image: Path, tmp_path: Path, readonly: bool) -> None:
    with daemon(image, tmp_path, writable=True) as process:
        until("the daemon has started", (tmp_path / "pid").exists)
        with pytest.raises(DiskError, match=f"process {process.pid} \\(qemu-storage"):
            open_raw(image, readonly=readonly)
        process.terminate()


def test_readers_share_with_qemus_readers(image: Path, tmp_path: Path) -> None:
    with daemon(image, tmp_path, writable=False) as process:
        until("the daemon has started", (tmp_path / "pid").exists)
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
