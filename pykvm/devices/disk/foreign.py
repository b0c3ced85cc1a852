"""Images that are not raw (qcow2, vmdk, …), by QEMU's own tools: no format is written here.

``qemu-storage-daemon`` shows the image as a raw file by way of FUSE, which is then a raw disk as
any other: flushes, discards and errors go through to the image, and QEMU's lock is on it. Where
there is no FUSE, ``qemu-img convert`` makes a raw copy, for a disk that is not written (read-only,
or below an overlay).

The daemon ends when this process does, however that ends: a shell beside it waits for the end of a
pipe that is held open here.
"""

from __future__ import annotations

import os

from pykvm.devices.disk.raw import RawDisk, open_raw
from pykvm.errors import DiskError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess

FORMATS = (
    "qcow2",
    "qcow",
    "qed",
    "vdi",
    "vhdx",
    "vmdk",
    "vpc",
    "parallels",
    "bochs",
    "cloop",
    "dmg",
)
"""What QEMU's tools read; some of them they can also write."""

_MAGICS = (
    ("qcow2", 0, b"QFI\xfb"), ("qed", 0, b"QED\0"), ("vdi", 0x40, b"\x7f\x10\xda\xbe"),
    ("vhdx", 0, b"vhdxfile"), ("vmdk", 0, b"KDMV"), ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vpc", 0, b"conectix"),
)  # fmt: skip

DAEMON, CONVERTER = "qemu-storage-daemon", "qemu-img"

_PACKAGES = {
    DAEMON: "Debian 12: apt install qemu-system-common, later ones: qemu-utils",
    CONVERTER: "Debian: apt install qemu-utils",
}

# Once nobody holds the pipe any more, the daemon is told to end, and gets the time to write what it
# still has.
_KEEPER = '"$@" </dev/null & p=$!; read -r line; kill $p 2>/dev/null; wait $p'

_START_SECONDS = 10.0
_END_SECONDS = 60.0


def looks_like(head: bytes) -> str:
    """The format that the first bytes of an image are typical of, or "".

    Only good for a question: whoever can write a raw disk can put these bytes there.
    """
    for name, at, magic in _MAGICS:
        if head[at : at + len(magic)] == magic:
            return name
    return ""


def open_foreign(path: str, form: str, *, readonly: bool = False, cache: str = "") -> RawDisk:
    """Open an image of another format.

    Args:
        path: the image.
        form: one of :data:`FORMATS`.
        readonly: it is not written.
        cache: as in ``open_raw``; ``"none"`` is the daemon's to do.

    Raises:
        DiskError: a tool is missing, or refused the image.
    """
    import shutil

    if not os.path.exists(path):
        raise FileNotFoundError(2, os.strerror(2), path)
    daemon, converter = shutil.which(DAEMON), shutil.which(CONVERTER)
    if daemon and os.access("/dev/fuse", os.R_OK | os.W_OK):
        return _Exported(daemon, path, form, readonly, cache)
    if readonly and converter:
        return _convert(converter, path, form)
    if daemon:
        raise DiskError(
            f"{path}: {DAEMON} needs /dev/fuse to show a {form} image as a disk (modprobe fuse, "
            f"and access to it); without, only {CONVERTER} can read it, for ro or overlay "
            f"({_PACKAGES[CONVERTER]})"
        )
    tools = f"{DAEMON} ({_PACKAGES[DAEMON]})"
    if readonly:
        tools += f" or {CONVERTER} ({_PACKAGES[CONVERTER]})"
    raise DiskError(f"{path}: a {form} image is opened by {tools}: not found in $PATH")


def _quoted(value: str) -> str:
    """A value in QEMU's key=value lists."""
    return value.replace(",", ",,")


class _Exported(RawDisk):
    """The file by which the daemon shows an image, and the daemon."""

    def __init__(self, daemon: str, path: str, form: str, readonly: bool, cache: str) -> None:
        import tempfile

        self._folder = tempfile.TemporaryDirectory(prefix="pykvm-disk-", ignore_cleanup_errors=True)
        self._keeper: subprocess.Popen[bytes] | None = None
        raw = f"{self._folder.name}/raw"
        try:
            with open(raw, "x"):
                pass
            self._start(daemon, path, form, readonly, cache == "none", raw)
            # The daemon does its own direct I/O; its file knows none.
            made = open_raw(raw, readonly=readonly, cache="" if cache == "none" else cache)
        except BaseException:
            self._stop()
            raise
        made.file.path = path
        super().__init__(made.file, readonly=readonly, write_back=made.write_back)

    def _start(
        self, daemon: str, path: str, form: str, readonly: bool, direct: bool, raw: str
    ) -> None:
        import subprocess
        import time

        folder = self._folder.name
        pidfile, said = f"{folder}/pid", f"{folder}/stderr"
        write = "off" if readonly else "on"
        only = "on" if readonly else "off"
        flags = f"read-only={only},cache.direct={'on' if direct else 'off'},discard=unmap"
        command = [
            daemon,
            "--blockdev",
            f"driver=file,node-name=file,filename={_quoted(os.path.abspath(path))},{flags}",
            "--blockdev",
            f"driver={form},node-name=disk,file=file,{flags}",
            "--export",
            f"type=fuse,id=export,node-name=disk,mountpoint={_quoted(raw)},writable={write}",
            "--pidfile",
            pidfile,
        ]
        with open(said, "wb") as errors:
            self._keeper = subprocess.Popen(
                ["/bin/sh", "-c", _KEEPER, "sh", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is not for it
            )
        end = time.monotonic() + _START_SECONDS
        # The number is written when everything has been set up.
        while not os.path.exists(pidfile):
            with open(said, errors="replace") as file:
                text = file.read().strip()
            if text or time.monotonic() > end:
                raise DiskError(f"{path}: {DAEMON}: {text or 'does not come up'}")
            time.sleep(0.005)

    def _stop(self) -> None:
        import subprocess

        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            assert keeper.stdin is not None
            keeper.stdin.close()
            try:
                keeper.wait(_END_SECONDS)
            except subprocess.TimeoutExpired as error:
                raise DiskError(f"{DAEMON} does not end: {self._folder.name}") from error
        self._folder.cleanup()

    def close(self) -> None:
        """Close it and wait until the daemon has written what it has. Idempotent."""
        super().close()
        self._stop()


def _convert(converter: str, path: str, form: str) -> RawDisk:
    """A raw copy in a temporary file that has no name any more."""
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory(prefix="pykvm-disk-") as folder:
        raw = f"{folder}/raw"
        done = subprocess.run(
            [converter, "convert", "-f", form, "-O", "raw", "--", path, raw],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise DiskError(f"{path}: {done.stderr.strip()}")
        disk = open_raw(raw, readonly=True)
    disk.path = path
    return disk
