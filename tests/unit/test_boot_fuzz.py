"""Images broken on purpose: a plan or a BootError, inside RAM, soon, in little memory."""

from __future__ import annotations

import itertools
import struct
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm import boot
from pykvm.boot.loader import PROTOCOLS
from pykvm.errors import BootError
from tests.support.kernels import (
    CODE,
    FIELDS,
    PACKERS,
    FakeMemory,
    bzimage,
    elf,
    multiboot_header,
    pvh_note,
    vmlinux,
)

RAM = 8 << 20
LINKED = 0x400000
MULTIBOOT = elf([(LINKED, multiboot_header() + CODE, 0x3000)], bits=32, entry=LINKED + 12)
BASES = {
    "bzimage": bzimage(),
    "bzimage xz": bzimage(packed="xz"),
    "bzimage lz4": bzimage(packed="lz4"),
    "bzimage elf": bzimage(packed="elf"),
    "vmlinux": vmlinux(),
    "pvh 32": elf([(LINKED, CODE, 0x3000)], bits=32, notes=pvh_note(LINKED, 4)),
    "multiboot": MULTIBOOT,
    "multiboot flat": b"\x90" * 32
    + multiboot_header(1 << 16, LINKED + 32, LINKED, 0, LINKED + 0x8000, LINKED + 64)
    + CODE,
}
NASTY = [
    *(0, 1, 2, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x1000, 0xFFFFF, RAM - 1, RAM),
    *((1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 32) - 4096, 1 << 32, 1 << 52, 1 << 63),
    *((1 << 64) - 1, (1 << 64) - 4096, 0x1BADB002, LINKED, 0x200000),
]


def try_to_load(image: bytes, **asked: Any) -> tuple[FakeMemory, boot.BootPlan | None]:
    """FakeMemory lets no write go outside RAM; a refused image must have written nothing."""
    mem = FakeMemory((0, 0xA0000), (0xE0000, RAM - 0xE0000))
    try:
        plan = boot.load(mem, image, cache=False, **asked)
    except BootError as error:
        assert mem.untouched, "written, then refused"
        assert "expected" in str(error) and "found" in str(error), str(error)
        return mem, None
    check(mem, plan)
    return mem, plan


def check(mem: FakeMemory, plan: boot.BootPlan) -> None:
    """What holds for every plan."""
    start, size = plan.kernel
    assert start <= plan.entry < start + size
    assert plan.mode == ("long64" if plan.protocol in ("vmlinux", "bzimage") else "prot32")
    taken = sorted((gpa, gpa + len(data)) for gpa, data in mem.writes.items() if data)
    for (_, end), (other, _) in itertools.pairwise(taken):
        assert end <= other, "two writes overlap"
    for gpa, length in [plan.initrd] if plan.initrd else []:
        assert gpa + length <= start or start + size <= gpa, "initrd in the kernel's memory"
        assert bytes(mem.writes[gpa]) == b"initrd"
    for gpa in (plan.boot_params_gpa, plan.info_gpa):
        assert not gpa or gpa in mem.writes
    for gpa, length in mem.cleared:
        assert start <= gpa and gpa + length <= start + size


def test_the_unbroken_ones_load() -> None:
    for name, image in BASES.items():
        _, plan = try_to_load(image, initrd=b"initrd", cmdline="quiet")
        assert plan is not None, name


@given(st.sampled_from(sorted(FIELDS)), st.sampled_from(NASTY) | st.integers(0, (1 << 64) - 1))
def test_any_value_in_any_field_of_the_setup_header(name: str, value: int) -> None:
    _, form, _ = FIELDS[name]
    value %= 1 << (8 * struct.calcsize(form))
    for protocol in ("auto", "bzimage"):
        fields: dict[str, Any] = {name: value}
        mem, plan = try_to_load(bzimage(**fields), initrd=b"initrd", protocol=protocol)
        assert plan is not None or mem.untouched


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    """An image with numbers overwritten, pieces cut out or doubled, and its end gone."""
    image = bytearray(BASES[draw(st.sampled_from(sorted(BASES)))])
    for _ in range(draw(st.integers(1, 4))):
        # Headers are where it matters, and most of a file is not header.
        at = draw(st.integers(0, 0x280) | st.integers(0, len(image)))
        match draw(st.integers(0, 4)):
            case 0:
                image[at : at + 4] = struct.pack("<I", draw(st.sampled_from(NASTY)) & 0xFFFFFFFF)
            case 1:
                image[at : at + 8] = struct.pack("<Q", draw(st.sampled_from(NASTY)))
            case 2:
                image[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 3:
                del image[at : at + draw(st.integers(0, 64))]
            case _:
                image[at:at] = image[at : at + draw(st.integers(0, 64))]
    if draw(st.booleans()):
        del image[draw(st.integers(0, len(image))) :]
    return bytes(image)


@given(broken(), st.sampled_from(PROTOCOLS))
@settings(max_examples=400)
def test_a_broken_image_loads_inside_ram_or_is_refused(image: bytes, protocol: str) -> None:
    mem, plan = try_to_load(image, initrd=b"initrd", cmdline="quiet", protocol=protocol)
    assert plan is not None or mem.untouched


@given(st.sampled_from(sorted(PACKERS)), st.data())
@settings(max_examples=200)
def test_a_broken_payload_is_refused_or_unpacked_to_what_was_announced(
    packed: str, data: st.DataObject
) -> None:
    payload = bytearray(PACKERS[packed](vmlinux()))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload) - 1) | st.integers(0, 32))
        payload[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del payload[data.draw(st.integers(0, len(payload))) :]
    mem, plan = try_to_load(bzimage(bytes(payload)), initrd=b"initrd")
    assert plan is not None or mem.untouched


@given(st.binary(max_size=0x1000), st.sampled_from(PROTOCOLS))
def test_bytes_that_mean_nothing(image: bytes, protocol: str) -> None:
    mem, plan = try_to_load(image, protocol=protocol)
    assert plan is not None or mem.untouched


@given(
    st.lists(
        st.tuples(st.integers(0, 96), st.integers(0, 32), st.integers(0, 4)), min_size=1, max_size=6
    )
)
def test_segments_anywhere_may_collide_with_what_the_kernel_is_told(
    places: list[tuple[int, int, int]],
) -> None:
    """In pages, over the first 128 pages, which have all that a loader places."""
    segments = [
        (page << 12, b"\xcc" * (size << 12), (size + more) << 12) for page, size, more in places
    ]
    image = elf(segments, bits=32, front=multiboot_header())
    mem, plan = try_to_load(image, initrd=b"initrd", cmdline="x" * 1000)
    assert plan is not None or mem.untouched


@pytest.mark.parametrize(
    "image",
    [
        elf([(0x100000, b"", 1 << 63)]),
        elf([(0x100000, b"x", (1 << 64) - 0x100000)]),
        elf([(0x100000 + n, b"", 0) for n in range(60_000)]),
        elf([(0x100000 + 0x10 * n, b"", 0x10) for n in range(60_000)]),
        elf([(0x100000 + 8 * n, b"", 8) for n in range(60_000)], bits=32, front=b""),
        elf([(0x200000, CODE, 4096)], notes=pvh_note(0)[:12] * 100_000),
        elf([(0x100000, multiboot_header() + CODE, 1 << 31)], bits=32),
        bzimage(init_size=0xFFFFFFFF, pref_address=0x200000),
        b"\x02\xb0\xad\x1b" * 4096,
    ],
    ids=[
        "bss",
        "wraps",
        "empty segments",
        "segments",
        "segments 32",
        "notes",
        "bss 32",
        "init_size",
        "magics",
    ],
)
def test_huge_claims_cost_little(image: bytes) -> None:
    tracemalloc.start()
    try:
        try_to_load(image)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 << 20


def test_a_kernel_larger_than_its_memory_is_refused_before_it_is_unpacked() -> None:
    payload = PACKERS["gzip"](bytes(64 << 20))
    tracemalloc.start()
    try:
        _, plan = try_to_load(bzimage(payload, init_size=128 << 20))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert plan is None and peak < 8 << 20
