"""Kernels that are none: what is refused, in which words, and nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pykvm import boot
from pykvm.errors import BootError
from pykvm.memory import GuestMemory
from tests.support.kernels import (
    CODE,
    INIT_SIZE,
    PACKERS,
    PREF,
    FakeMemory,
    bzimage,
    elf,
    vmlinux,
)

RAM = 16 << 20


@pytest.fixture
def mem() -> Iterator[GuestMemory]:
    with GuestMemory(RAM) as made:
        yield made


def load(mem: Any, kernel: Any, **asked: Any) -> boot.BootPlan:
    return boot.load(mem, kernel, **{"cache": False, **asked})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"boot_flag": 0x55AA}, "boot_flag: expected 0xaa55, found 0x55aa"),
        ({"version": 0x20B}, r"version: expected at least 2\.12 .*, found 2\.11"),
        ({"jump": 0x6AE9}, "jump: expected 0xeb, a short jump, found 0xe9"),
        ({"jump": 0x61EB}, r"jump: expected a header that ends in 0x264..0x290, found 0x263"),
        ({"jump": 0x8FEB}, r"jump: expected a header that ends in 0x264..0x290, found 0x291"),
        ({"loadflags": 0}, r"loadflags: expected bit 0 \(LOADED_HIGH\), a bzImage, found 0x0"),
        ({"xloadflags": 0x7E}, r"xloadflags: expected bit 0 \(XLF_KERNEL_64\).*, found 0x7e"),
        ({"syssize": 1 << 28}, "setup_sects and syssize: expected an end within"),
        ({"setup_sects": 0xFF}, "setup_sects and syssize: expected an end within"),
        ({"payload_offset": 0x7FFFFFFF}, "payload_offset and payload_length: expected an end"),
        ({"payload_length": 0xFFFFFFFF}, "payload_offset and payload_length: expected an end"),
        ({"kernel_alignment": 0}, "kernel_alignment: expected a power of two, found 0x0"),
        ({"kernel_alignment": 0x3000}, "kernel_alignment: expected a power of two, found 0x3000"),
        ({"pref_address": PREF + 4096}, "pref_address: expected a multiple of kernel_alignment"),
        ({"pref_address": 0}, r"pref_address: expected .* from 1 MiB on, found 0x0"),
        ({"pref_address": 0xFFE00000, "init_size": 0x200001}, "an end below 4 GiB, found 0x1000"),
        ({"pref_address": 1 << 63}, "pref_address and init_size: expected an end below 4 GiB"),
        ({"pref_address": 0x40000000}, "bzImage: init_size: expected RAM at 0x40000000"),
        ({"init_size": RAM - PREF + 1}, r"bzImage: init_size: expected RAM at 0x200000\.\.0x1"),
        ({"init_size": 0x100}, "init_size: expected at least the code itself"),
    ],
)
def test_a_field_out_of_its_limits_is_named_and_nothing_is_written(
    fields: dict[str, Any], message: str
) -> None:
    mem = FakeMemory((0, RAM))
    with pytest.raises(BootError, match=message):
        load(mem, bzimage(**fields))
    assert mem.untouched


@pytest.mark.parametrize("length", [0x206, 0x263, 0x700, 0x900])
def test_a_truncated_image_is_named_as_such(length: int) -> None:
    mem = FakeMemory((0, RAM))
    with pytest.raises(
        BootError, match=r"found (a file of \d+ bytes|0x\w+ \(a truncated file\?\))"
    ):
        load(mem, bzimage()[:length])
    assert mem.untouched


def test_a_size_beyond_init_size_is_refused_before_anything_is_unpacked() -> None:
    bomb = PACKERS["gzip"](bytes(INIT_SIZE + 1))
    with pytest.raises(BootError, match=r"unpacked size .*expected at most init_size \(0x80000\)"):
        load(FakeMemory((0, RAM)), bzimage(bomb))


def test_a_payload_that_is_no_kernel_is_refused() -> None:
    mem = FakeMemory((0, RAM))
    with pytest.raises(BootError, match="ELF image: e_ident magic"):
        load(mem, bzimage(PACKERS["xz"](b"no kernel at all")))
    assert mem.untouched


def test_a_kernel_inside_that_lies_outside_its_image_must_be_ram_too() -> None:
    payload = PACKERS["gzip"](elf([(PREF, CODE, 4096), (RAM - 4096, CODE, 4097)]))
    with pytest.raises(BootError, match="the kernel: expected RAM"):
        load(FakeMemory((0, RAM)), bzimage(payload))


@pytest.mark.parametrize("kernel", [b"", b"MZ", bytes(5000), b"#!/bin/sh\n"])
def test_what_is_no_kernel_is_told_so(kernel: bytes) -> None:
    with pytest.raises(BootError, match="kernel: expected a bzImage, an ELF file or a multiboot"):
        load(FakeMemory((0, RAM)), kernel)


def test_an_elf_file_is_no_bzimage() -> None:
    with pytest.raises(BootError, match='expected "HdrS" at 0x202, found an ELF file'):
        load(FakeMemory((0, RAM)), vmlinux(), protocol="bzimage")


def test_what_makes_no_sense_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="protocol 'grub' is none of auto, bzimage"):
        load(FakeMemory((0, RAM)), bzimage(), protocol="grub")
    with pytest.raises(ValueError, match="kaslr=True needs the bzImage's own decompressor"):
        load(FakeMemory((0, RAM)), bzimage(), protocol="vmlinux", kaslr=True)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    mem = FakeMemory((0, RAM))
    with pytest.raises(BootError, match=r"kernel: .*nothing"):
        load(mem, tmp_path / "nothing")
    with pytest.raises(BootError, match=r"initrd: .*nothing"):
        load(mem, bzimage(), initrd=tmp_path / "nothing")
    with pytest.raises(BootError, match=r"kernel: .*directory"):
        load(mem, tmp_path)
