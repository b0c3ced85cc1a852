"""What disk is meant: ``PATH[,ro][,overlay][,cache=…][,format=…][,serial=…]``."""

from __future__ import annotations

import os

from pykvm.devices.disk.foreign import FORMATS, looks_like, open_foreign
from pykvm.devices.disk.raw import open_raw
from pykvm.errors import DiskError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.devices.disk.base import Disk

CACHES = ("writeback", "writethrough", "none")
SERIAL_BYTES = 20
"""virtio 1.2, 5.2.6: the longest ID string."""

SYNTAX = (
    "PATH[,ro][,overlay][,cache=writeback|writethrough|none][,format=raw|qcow2|…][,serial=TEXT]"
)


class DiskSpec:
    """Which image, and how it is used.

    Args:
        path: a file or block device.
        readonly: the guest cannot write it.
        overlay: the guest can write it, and the image stays as it is.
        cache: ``"writeback"``: what the guest flushes is on the medium; ``"writethrough"``: what it
            writes is; ``"none"``: as writeback, past the host's page cache. "": writeback.
        format: ``"raw"``, or one of ``foreign.FORMATS``. "": raw, if it does not look otherwise.
        serial: the ID string, 20 ASCII characters at most; Linux has it in /dev/disk/by-id.

    Raises:
        ValueError: these do not go together, or there is no such value.
    """

    __slots__ = ("cache", "format", "overlay", "path", "readonly", "serial")

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        readonly: bool = False,
        overlay: bool = False,
        cache: str = "",
        format: str = "",
        serial: str = "",
    ) -> None:
        self.path = os.fspath(path)
        self.readonly, self.overlay = readonly, overlay
        self.cache, self.format, self.serial = cache, format, serial
        if not self.path:
            raise ValueError(f"a disk needs a path: {SYNTAX}")
        if readonly and overlay:
            raise ValueError(
                "a disk is either ro (the guest cannot write) or overlay (it can, for nothing)"
            )
        if cache and cache not in CACHES:
            raise ValueError(f"cache={cache}: it is one of {', '.join(CACHES)}")
        if cache and overlay:
            raise ValueError(
                f"cache={cache} says when a write is stable; nothing written to an overlay stays"
            )
        if format and format != "raw" and format not in FORMATS:
            raise ValueError(f"format={format}: it is one of raw, {', '.join(FORMATS)}")
        if len(serial) > SERIAL_BYTES or not serial.isascii() or not (serial + "x").isprintable():
            raise ValueError(
                f"serial={serial!r}: at most {SERIAL_BYTES} printable characters of ASCII"
            )

    @classmethod
    def parse(cls, text: str) -> DiskSpec:
        """Read what the command line has; a comma in the path is written twice, as QEMU has it.

        Raises:
            ValueError: an unknown option, or what ``DiskSpec`` raises.
        """
        path, *options = text.replace(",,", "\0").split(",")
        found: dict[str, str | bool] = {}
        for option in (option.replace("\0", ",") for option in options):
            name, equals, value = option.partition("=")
            if name in ("ro", "overlay") and not equals:
                key, given = {"ro": "readonly"}.get(name, name), True
            elif name in ("cache", "format", "serial") and value:
                key, given = name, value  # type: ignore[assignment]
            else:
                raise ValueError(f"{option or ','!r} in {text!r} is not understood: {SYNTAX}")
            if key in found:
                raise ValueError(f"{name} stands twice in {text!r}")
            found[key] = given
        return cls(path.replace("\0", ","), **found)  # type: ignore[arg-type]

    def open(self) -> Disk:
        """Open and lock it.

        Raises:
            OSError: the host refuses.
            DiskError: it is in use, looks like another format, or a tool is missing.
        """
        below = self._open_image(self.readonly or self.overlay)
        if not self.overlay:
            return below
        from pykvm.devices.disk.overlay import OverlayDisk

        try:
            return OverlayDisk(below)
        except BaseException:
            below.close()
            raise

    def _open_image(self, readonly: bool) -> Disk:
        if self.format not in ("", "raw"):
            return open_foreign(self.path, self.format, readonly=readonly, cache=self.cache)
        disk = open_raw(self.path, readonly=readonly, cache=self.cache)
        try:
            if not self.format and (found := looks_like(_head(disk))):
                # Not simply taken for it: a guest can write these bytes on a raw disk, and names of
                # other files of the host behind them.
                raise DiskError(
                    f"{self.path} looks like a {found} image: say format={found}, or format=raw "
                    "if these bytes are what the guest is to see"
                )
        except BaseException:
            disk.close()
            raise
        return disk

    def __repr__(self) -> str:
        return f"<DiskSpec {self}>"

    def __str__(self) -> str:
        """As :meth:`parse` reads it."""
        words = [self.path]
        words += ["ro"] if self.readonly else []
        words += ["overlay"] if self.overlay else []
        for name in ("cache", "format", "serial"):
            if value := getattr(self, name):
                words.append(f"{name}={value}")
        return ",".join(word.replace(",", ",,") for word in words)


def _head(disk: Disk) -> bytes:
    """The first bytes of the image, read as the guest would."""
    import mmap

    size = min(disk.sectors * 512, 4096)
    if not size:
        return b""
    # Page-aligned, for O_DIRECT.
    with mmap.mmap(-1, 4096) as buffer, memoryview(buffer) as whole, whole[:size] as view:
        disk.read([view], 0)
        return bytes(view)
