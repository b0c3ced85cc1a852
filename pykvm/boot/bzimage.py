"""The bzImage file: its setup header, checked, and the kernel packed inside.

Fields and their limits are those of Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".
"""

from __future__ import annotations

import struct

from pykvm.boot import layout, params
from pykvm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.boot.image import Image
    from pykvm.boot.job import Job

_MAGIC = b"HdrS"
_MAGIC_AT = 0x202
_BOOT_FLAG = 0xAA55
_SHORT_JUMP = 0xEB
_MIN_VERSION = 0x20C
_MIN_END = 0x264  # the end of init_size, the last field that is read here
_XLF_KERNEL_64 = 1
_XLF_CAN_BE_LOADED_ABOVE_4G = 2
_4GIB = 1 << 32
_ANYWHERE = 1 << 52
_LONGEST_VERSION = 256

# name: (offset, struct's format)
_FIELDS = {
    "setup_sects": (0x1F1, "<B"),
    "syssize": (0x1F4, "<I"),
    "boot_flag": (0x1FE, "<H"),
    "jump": (0x200, "<B"),
    "jump_offset": (0x201, "<B"),
    "version": (0x206, "<H"),
    "kernel_version": (0x20E, "<H"),
    "loadflags": (0x211, "<B"),
    "initrd_addr_max": (0x22C, "<I"),
    "kernel_alignment": (0x230, "<I"),
    "xloadflags": (0x236, "<H"),
    "cmdline_size": (0x238, "<I"),
    "payload_offset": (0x248, "<I"),
    "payload_length": (0x24C, "<I"),
    "pref_address": (0x258, "<Q"),
    "init_size": (0x260, "<I"),
}


def is_bzimage(data: memoryview) -> bool:
    """Whether the file has Linux's setup header."""
    return bytes(data[_MAGIC_AT : _MAGIC_AT + 4]) == _MAGIC


class BzImage:
    """A checked bzImage with a 64-bit entry: boot protocol 2.12 (Linux 3.8) and later.

    Attributes:
        header: the setup header from 0x1f1 on, as the zero page takes it.
        code: the protected-mode code: the decompressor and the payload.
        payload: the packed kernel; empty where the header names none.
        version: what it says of itself, or "".
        pref_address: where it wants to run.
        init_size: bytes it needs there, before it reads the memory map.
        cmdline_size: bytes of the longest command line it takes, without the NUL.
        initrd_limits: the initrd ends at or below the first; below the second if need be.
    """

    def __init__(self, data: memoryview) -> None:
        if len(data) < _MIN_END:
            raise _bad("the setup header", f"{_MIN_END} bytes", f"a file of {len(data)} bytes")
        field: dict[str, int] = {
            name: struct.unpack_from(form, data, at)[0] for name, (at, form) in _FIELDS.items()
        }
        _check(data, field)
        self.header = bytes(data[params.HEADER : _MAGIC_AT + field["jump_offset"]])
        start = ((field["setup_sects"] or 4) + 1) * 512
        size = field["syssize"] * 16
        if start + size - 15 > len(data):  # syssize is rounded up, and not every file is padded
            expected = f"an end within {len(data):#x} bytes"
            found = f"{start + size:#x} (a truncated file?)"
            raise _bad("setup_sects and syssize", expected, found)
        self.code = data[start : start + size]
        self.payload = self._payload(field["payload_offset"], field["payload_length"])
        self.version = _version(data[0x200:start], field["kernel_version"])
        self.cmdline_size = field["cmdline_size"]
        self.pref_address = field["pref_address"]
        self.init_size = field["init_size"]
        self.initrd_limits: tuple[int, ...] = (field["initrd_addr_max"] + 1,)
        if field["xloadflags"] & _XLF_CAN_BE_LOADED_ABOVE_4G:
            self.initrd_limits += (_ANYWHERE,)
        self._check_memory(field["kernel_alignment"])

    def _payload(self, offset: int, length: int) -> memoryview:
        if offset + length > len(self.code):
            expected = f"an end within the {len(self.code):#x} bytes of code"
            raise _bad("payload_offset and payload_length", expected, f"{offset + length:#x}")
        return self.code[offset : offset + length] if offset else self.code[:0]

    def _check_memory(self, alignment: int) -> None:
        """Check where it wants to run."""
        start, end = self.pref_address, self.pref_address + self.init_size
        if alignment & (alignment - 1) or not alignment:
            raise _bad("kernel_alignment", "a power of two", f"{alignment:#x}")
        if start % alignment or start < layout.HIGH_MEMORY:
            expected = f"a multiple of kernel_alignment ({alignment:#x}) from 1 MiB on"
            raise _bad("pref_address", expected, f"{start:#x}")
        if end > _4GIB:
            raise _bad("pref_address and init_size", "an end below 4 GiB", f"{end:#x}")
        if self.init_size < len(self.code):
            expected = f"at least the code itself ({len(self.code):#x})"
            raise _bad("init_size", expected, f"{self.init_size:#x}")

    def unpacked_size(self) -> int:
        """Bytes of the kernel once unpacked: the last word of the payload, in every format.

        Raises:
            BootError: more than init_size has room for.
        """
        size = int.from_bytes(self.payload[-4:], "little")
        if size > self.init_size:
            expected = f"at most init_size ({self.init_size:#x})"
            raise _bad("the payload's unpacked size (its last word)", expected, f"{size:#x}")
        return size


def _check(data: memoryview, field: dict[str, int]) -> None:
    """Check what decides whether this is an image that can be entered at all."""
    if field["boot_flag"] != _BOOT_FLAG:
        raise _bad("boot_flag", f"{_BOOT_FLAG:#x}", f"{field['boot_flag']:#x}")
    if not is_bzimage(data):
        raise _bad("header", _MAGIC.hex(" "), bytes(data[_MAGIC_AT : _MAGIC_AT + 4]).hex(" "))
    version = field["version"]
    if version < _MIN_VERSION:
        expected = "at least 2.12 (Linux 3.8, the first with a 64-bit entry)"
        raise _bad("version", expected, f"{version >> 8}.{version & 0xFF:02}")
    if field["jump"] != _SHORT_JUMP:
        raise _bad("jump", f"{_SHORT_JUMP:#x}, a short jump", f"{field['jump']:#x}")
    end = _MAGIC_AT + field["jump_offset"]
    if not _MIN_END <= end <= min(params.HEADER_END, len(data)):
        expected = f"a header that ends in {_MIN_END:#x}..{params.HEADER_END:#x}"
        raise _bad("jump", expected, f"{end:#x}")
    if not field["loadflags"] & params.LOADED_HIGH:
        raise _bad("loadflags", "bit 0 (LOADED_HIGH), a bzImage", f"{field['loadflags']:#x}")
    if not field["xloadflags"] & _XLF_KERNEL_64:
        expected = "bit 0 (XLF_KERNEL_64), a 64-bit kernel"
        raise _bad("xloadflags", expected, f"{field['xloadflags']:#x}")


def _version(setup: memoryview, offset: int) -> str:
    """The string that kernel_version points to, or "" where it points nowhere."""
    text, nul, _ = bytes(setup[offset : offset + _LONGEST_VERSION]).partition(b"\0")
    return text.decode("ascii", "replace") if offset and nul else ""


def unpacked(job: Job, image: BzImage, required: bool) -> Image | None:
    """The kernel inside, from the cache or unpacked now.

    None, and a note, where nothing here unpacks it; BootError instead if it is ``required``, and
    always for a payload that is corrupt: the image could not unpack it either.
    """
    from pykvm.boot import cache, unpack

    plan, store = job.plan, job.cache
    name = plan.format = unpack.identify(image.payload)
    status = job.kernel.status
    alias = cache.identity(status) if status is not None else ""
    digest = ""
    kernel = store.find(alias)
    known_by_file = alias and name in unpack.QUICK  # to unpack it takes no longer than a digest
    if kernel is None and name and store.folder is not None and not known_by_file:
        digest = cache.digest(image.payload)
        kernel = store.find(digest)
        if kernel is not None:
            store.link(alias, digest)
    if store.folder is not None:
        plan.cache_hit = kernel is not None
    if kernel is not None:
        job.lap("unpack")
        return kernel
    reason = unpack.can_unpack(name) if image.payload else "payload_offset is 0"
    if reason:
        if required:
            raise _bad("payload", "one that can be unpacked here", reason)
        plan.notes.append(f"the image unpacks itself: {reason}")
        return None
    from pykvm.boot import elf, pvh
    from pykvm.boot.image import from_elf

    size = len(image.payload) if name == "elf" else image.unpacked_size()
    parsed = elf.parse(unpack.unpack(image.payload, name, size))
    kernel = from_elf(parsed, pvh.find_entry(parsed))
    job.lap("unpack")
    if store.folder is not None:
        plan.to_keep = lambda: _keep(job, digest or cache.digest(image.payload), kernel, alias)
    return kernel


def _keep(job: Job, digest: str, kernel: Image, alias: str) -> None:
    """Store a kernel, and note it if that cannot be done."""
    job.skip()
    if job.cache.find(digest) is not None:  # of another file, or by another process meanwhile
        job.cache.link(alias, digest)
    elif not job.cache.store(digest, kernel, alias):
        reason = f"{job.cache.folder} cannot be written: {job.cache.trouble}"
        job.plan.notes.append(f"the unpacked kernel was not kept: {reason}")
    job.lap("store")


def _bad(field: str, expected: str, found: str) -> BootError:
    return BootError(f"bzImage: {field}: expected {expected}, found {found}")
