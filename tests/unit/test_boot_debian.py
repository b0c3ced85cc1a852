"""Kernels of a distribution, as far as there are any here: what is unpacked is what they are.

Looked for where the rig keeps Debian's (``python -m tests.rig --setup-only`` fetches it), in /boot,
and in the folders of $PYKVM_KERNELS.
"""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pykvm import boot
from pykvm.boot import bzimage, layout
from pykvm.memory import GuestMemory
from tests.rig.host import default_cache

FOLDERS = [
    default_cache() / "kernel" / "boot",
    Path("/boot"),
    *(Path(name) for name in os.environ.get("PYKVM_KERNELS", "").split(":") if name),
]
KERNELS = sorted(path for folder in FOLDERS for path in folder.glob("vmlinuz-*"))
KERNELS = [path for path in KERNELS if os.access(path, os.R_OK)]

if not KERNELS:
    pytest.skip(
        f"no vmlinuz-* in {', '.join(map(str, FOLDERS))}: python -m tests.rig --setup-only",
        allow_module_level=True,
    )


@pytest.fixture(params=KERNELS, ids=lambda path: path.name)
def kernel(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture
def mem() -> Iterator[GuestMemory]:
    with GuestMemory("512M") as made:
        yield made


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests of this file, so that each kernel is unpacked once."""
    return tmp_path_factory.mktemp("vmlinux")


def load(mem: GuestMemory, kernel: Path, cache: Path, **asked: Any) -> boot.BootPlan:
    plan = boot.load(mem, kernel, cache=cache, **asked)
    assert plan.notes == []
    return plan


def test_the_header_says_what_file_says(kernel: Path) -> None:
    image = bzimage.BzImage(memoryview(kernel.read_bytes()))
    assert image.version.startswith(kernel.name.removeprefix("vmlinuz-"))
    assert image.pref_address == 0x1000000 and image.cmdline_size == 2047
    if shutil.which("file"):
        said = subprocess.run(
            ["file", "-bL", kernel], capture_output=True, text=True, check=True, timeout=100
        )
        assert f"version {image.version}," in said.stdout


def test_memory_holds_what_pyelftools_sees_in_the_payload(
    mem: GuestMemory, kernel: Path, cache: Path
) -> None:
    elffile = pytest.importorskip("elftools.elf.elffile")
    from pykvm.boot import unpack

    image = bzimage.BzImage(memoryview(kernel.read_bytes()))
    name = unpack.identify(image.payload)
    raw = bytes(unpack.unpack(image.payload, name, image.unpacked_size()))
    theirs = elffile.ELFFile(io.BytesIO(raw))
    for _ in "unpacked", "cached":
        mem.fill(0x1000000, 96 << 20, 0xEE)
        plan = load(mem, kernel, cache)
        assert plan.entry == theirs["e_entry"] and plan.format == name
        for segment in theirs.iter_segments("PT_LOAD"):
            start, size = segment["p_paddr"], segment["p_memsz"]
            assert mem[start : start + size] == segment.data().ljust(size, b"\0")
            assert plan.kernel[0] <= start and start + size <= sum(plan.kernel)
    assert plan.cache_hit


def test_its_pvh_entry_is_that_of_its_note(mem: GuestMemory, kernel: Path, cache: Path) -> None:
    plan = load(mem, kernel, cache, protocol="pvh")
    assert plan.mode == "prot32" and plan.kernel[0] <= plan.entry < sum(plan.kernel)
    # cld; lgdt: what pvh_start_xen begins with, in Linux 4.21 to 6.x at least
    assert mem[plan.entry : plan.entry + 3] == b"\xfc\x0f\x01"


def test_all_that_it_is_told_is_in_place(mem: GuestMemory, kernel: Path, cache: Path) -> None:
    line = "console=ttyS0 " + "x" * 2000
    plan = load(mem, kernel, cache, initrd=b"070701" * 10_000, cmdline=line, rsdp_gpa=layout.RSDP)
    assert mem.cstring(plan.cmdline_gpa) == line.encode()
    assert plan.initrd is not None and sum(plan.initrd) <= 512 << 20
    page = mem.read(plan.boot_params_gpa, 4096)
    assert struct.unpack_from("<IHI", page, 0x202)[0] == int.from_bytes(b"HdrS", "little")
    assert page[0x210] == 0xFF and page[0x211] & 0x83 == 1
    assert struct.unpack_from("<I", page, 0x228) == (plan.cmdline_gpa,)
    assert struct.unpack_from("<II", page, 0x218) == plan.initrd


def test_its_own_decompressor_lies_at_its_preferred_address(
    mem: GuestMemory, kernel: Path, cache: Path
) -> None:
    plan = load(mem, kernel, cache, kaslr=True)
    assert (plan.protocol, plan.entry) == ("bzimage", 0x1000200)
    # cld; cli: what startup_64 of arch/x86/boot/compressed/head_64.S begins with
    assert mem[plan.entry : plan.entry + 2] == b"\xfc\xfa"
