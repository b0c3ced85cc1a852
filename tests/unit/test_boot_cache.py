"""The cache of unpacked kernels: it makes a boot faster, and never makes one fail."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pykvm import boot
from pykvm.boot import cache as caching
from pykvm.boot import unpack
from pykvm.boot.cache import Cache, default_folder, identity
from pykvm.boot.image import Image
from pykvm.memory import GuestMemory
from tests.support.kernels import CODE, PREF, bzimage, vmlinux

RAM = 16 << 20
LONG_AGO = (10**9, 10**9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "vmlinux"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel that was not changed lately."""
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage())
    monkeypatch.setattr(caching, "_SETTLED", 0)
    return path


@pytest.fixture
def unpackings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The formats that were really unpacked, in order."""
    seen: list[str] = []
    real = unpack.unpack

    def counted(payload: memoryview, name: str, size: int) -> memoryview:
        seen.append(name)
        return real(payload, name, size)

    monkeypatch.setattr(unpack, "unpack", counted)
    yield seen


def load(kernel: Any, folder: Any, **asked: Any) -> tuple[boot.BootPlan, bytes]:
    """The plan, and all of RAM, which was full of something else."""
    with GuestMemory(RAM) as mem:
        mem.fill(PREF, 8 << 20, 0xEE)
        plan = boot.load(mem, kernel, cache=folder, **asked)
        return plan, mem[0:RAM]


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.is_symlink())


def test_the_second_time_nothing_is_unpacked_and_memory_is_the_same(
    folder: Path, unpackings: list[str]
) -> None:
    first, before = load(bzimage(), folder)
    assert first.cache_hit is False and list(first.timings) == ["read", "unpack", "load", "store"]
    second, after = load(bzimage(), folder)
    assert second.cache_hit is True and unpackings == ["gzip"]
    assert after == before and before[PREF : PREF + len(CODE)] == CODE
    assert (second.entry, second.kernel, second.format) == (first.entry, first.kernel, "gzip")
    (entry,) = entries(folder)
    assert entry.stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700


def test_the_pvh_entry_is_kept_too(folder: Path) -> None:
    load(bzimage(), folder)
    plan, _ = load(bzimage(), folder, protocol="pvh")
    assert plan.cache_hit and plan.entry == PREF + 0x40


def test_another_payload_is_another_entry(folder: Path, unpackings: list[str]) -> None:
    load(bzimage(packed="gzip"), folder)
    load(bzimage(packed="xz"), folder)
    assert unpackings == ["gzip", "xz"] and len(entries(folder)) == 2


def test_without_a_cache_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unpackings: list[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in "12":
        plan, _ = load(bzimage(), False)
        assert plan.cache_hit is None
    assert list(tmp_path.iterdir()) == [] and unpackings == ["gzip", "gzip"]


def test_the_users_cache_folder_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load(bzimage(), True)
    assert len(entries(tmp_path / "pykvm" / "vmlinux")) == 1
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        monkeypatch.setenv("HOME", "/home/somebody")
        assert default_folder() == "/home/somebody/.cache/pykvm/vmlinux"


def test_keeping_can_wait(folder: Path) -> None:
    plan, _ = load(bzimage(), folder, keep_later=True)
    assert not folder.exists() and "store" not in plan.timings
    plan.keep()
    assert len(entries(folder)) == 1 and plan.timings["store"] > 0
    entries(folder)[0].unlink()
    plan.keep()
    assert entries(folder) == [], "once is enough"


# -- known by its file -----------------------------------------------------------------------------


def test_a_file_that_did_not_change_is_not_even_read(
    folder: Path, kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(kernel, folder)

    def unexpected(payload: memoryview) -> str:
        raise AssertionError("the payload was read")

    monkeypatch.setattr(caching, "digest", unexpected)
    plan, ram = load(kernel, folder)
    assert plan.cache_hit and ram[PREF : PREF + len(CODE)] == CODE


def test_what_is_unpacked_quickly_is_not_digested_before(
    folder: Path, kernel: Path, monkeypatch: pytest.MonkeyPatch, unpackings: list[str]
) -> None:
    order: list[str] = []
    real = caching.digest

    def digest(payload: memoryview) -> str:
        order.append("digest")
        return real(payload)

    monkeypatch.setattr(caching, "digest", digest)
    kernel.write_bytes(bzimage(packed="elf"))
    plan, before = load(kernel, folder, keep_later=True)
    assert order == [] and unpackings == ["elf"] and plan.cache_hit is False
    plan.keep()
    assert order == ["digest"] and len(entries(folder)) == 1
    plan, after = load(kernel, folder)
    assert plan.cache_hit and order == ["digest"] and after == before


def test_a_copy_of_such_a_file_leads_to_the_entry_that_is_there(
    folder: Path, kernel: Path, tmp_path: Path
) -> None:
    kernel.write_bytes(bzimage(packed="elf"))
    load(kernel, folder)
    (entry,) = entries(folder)
    made = entry.stat()
    copy = tmp_path / "copy"
    copy.write_bytes(kernel.read_bytes())
    load(copy, folder)
    assert entries(folder) == [entry] and entry.stat().st_ino == made.st_ino
    assert load(copy, folder)[0].cache_hit


def test_a_file_that_changed_is_read_again(folder: Path, kernel: Path, tmp_path: Path) -> None:
    load(kernel, folder)
    changed = bytearray(vmlinux())
    changed[changed.index(CODE)] ^= 0xFF
    other = bzimage(unpacked_as(bytes(changed)))
    before = kernel.stat()
    kernel.write_bytes(other.ljust(before.st_size, b"\0"))
    os.utime(kernel, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copying tool may
    plan, ram = load(kernel, folder)
    assert plan.cache_hit is False and ram[PREF] == CODE[0] ^ 0xFF


def unpacked_as(data: bytes) -> bytes:
    from tests.support.kernels import PACKERS

    return PACKERS["gzip"](data)


def test_a_file_that_changed_just_now_is_not_known_by_its_times(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage())
    assert identity(path.stat()) == ""
    load(path, folder)
    assert all(not each.is_symlink() for each in folder.iterdir())


def test_a_copy_of_a_known_kernel_is_known_by_its_digest_and_then_by_its_file(
    folder: Path, kernel: Path, tmp_path: Path, unpackings: list[str]
) -> None:
    load(kernel, folder)
    copy = tmp_path / "copy"
    copy.write_bytes(kernel.read_bytes())
    plan, _ = load(copy, folder)
    assert plan.cache_hit and unpackings == ["gzip"]
    assert (folder / identity(copy.stat())).is_symlink()


# -- entries that are none -------------------------------------------------------------------------


def damage_truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def damage_empty(path: Path) -> None:
    os.truncate(path, 0)


def damage_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[28] ^= 1  # the entry point
    path.write_bytes(data)


def damage_version(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8] = 99
    path.write_bytes(data)


def damage_garbage(path: Path) -> None:
    path.write_bytes(b"garbage" * 10_000)


def damage_counts(path: Path) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into("<II", data, 44, 0xFFFFFFFF, 0xFFFFFFFF)
    path.write_bytes(data)


def damage_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def damage_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def damage_shared(path: Path) -> None:
    path.chmod(0o666)


@pytest.mark.parametrize(
    "damage", [value for name, value in globals().items() if name.startswith("damage_")]
)
def test_an_entry_that_is_damaged_or_not_ours_alone_is_as_good_as_none(
    folder: Path, kernel: Path, unpackings: list[str], damage: Any
) -> None:
    _, before = load(kernel, folder)
    damage(entries(folder)[0])
    plan, after = load(kernel, folder)
    assert plan.cache_hit is False and unpackings == ["gzip", "gzip"] and after == before


def test_every_truncated_entry_is_noticed(tmp_path: Path) -> None:
    store = Cache(tmp_path)
    data = bytes(range(1, 256)) * 33
    image = Image(0x1000, None, [(0x1000, 0x3000)], [(0x1000, data), (0x3000, b"tail")])
    assert store.store("abc", image)
    (path,) = entries(tmp_path)
    whole = path.read_bytes()
    found = store.find("abc")
    assert found is not None
    assert [(gpa, bytes(run)) for gpa, run in found.runs] == list(image.runs)
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert store.find("abc") is None, length
    path.write_bytes(whole + b"\0")
    assert store.find("abc") is None


def test_a_header_that_names_bytes_outside_its_ranges_is_refused(tmp_path: Path) -> None:
    for ranges in [[(0x1000, 4)], [(0x2000, 0x1000)], []]:
        store = Cache(tmp_path)
        assert store.store("abc", Image(0x1000, None, ranges, [(0x1000, b"12345")]))
        assert store.find("abc") is None


# -- folders that cannot be used -------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.touch()
    plan, ram = load(bzimage(), blocker / "vmlinux")
    assert plan.cache_hit is False and ram[PREF : PREF + len(CODE)] == CODE
    assert plan.notes == [
        f"the unpacked kernel was not kept: {blocker}/vmlinux cannot be written: Not a directory"
    ]


def test_a_write_that_fails_half_way_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = caching._parts

    def full(image: Image) -> Iterator[Any]:
        yield next(iter(real(image)))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching, "_parts", full)
    plan, _ = load(bzimage(), folder)
    assert plan.notes[0].endswith("cannot be written: No space left on device")
    assert "was not kept" in plan.notes[0] and list(folder.iterdir()) == []


def test_writers_at_the_same_time_do_not_disturb_each_other(folder: Path) -> None:
    plans = []

    def go() -> None:
        plans.append(load(bzimage(), folder))

    threads = [threading.Thread(target=go) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({ram for _, ram in plans}) == 1 and len(plans) == 8
    assert len(entries(folder)) == 1
    assert load(bzimage(), folder)[0].cache_hit


# -- kept within bounds ----------------------------------------------------------------------------


def small(size: int) -> Image:
    return Image(0x1000, None, [(0x1000, size)], [(0x1000, b"x" * size)])


def name_of(text: str) -> str:
    """A name as digests have them."""
    return text.encode().hex().ljust(64, "0")


def names_in(folder: Path) -> set[str]:
    """Names of entries, as they went into ``name_of``, and all other names."""
    return {
        bytes.fromhex(path.stem).rstrip(b"\0").decode() if len(path.stem) == 64 else path.name
        for path in folder.iterdir()
    }


def test_the_least_recently_used_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "MAX_BYTES", 40_000)
    store = Cache(tmp_path)
    for number, name in enumerate("abc"):
        store.store(name_of(name), small(8000))
        seconds = time.time() - 1000 + number
        os.utime(tmp_path / f"{name_of(name)}.1", (seconds, seconds))
    assert store.find(name_of("a")) is not None, "and so used now"
    store.store(name_of("d"), small(8000))
    assert names_in(tmp_path) == {"a", "c", "d"}
    store.store(name_of("huge"), small(100_000))
    assert names_in(tmp_path) == {"huge"}, "the newest always stays"


def test_what_nobody_used_for_long_goes_with_its_links_and_strays(tmp_path: Path) -> None:
    store = Cache(tmp_path)
    store.store(name_of("old"), small(100), alias="id-1")
    store.store(name_of("young"), small(100), alias="id-2")
    strays = [f".{n:016x}.tmp" for n in range(2)]
    for name in (*strays, f"{name_of('former')}.0"):
        (tmp_path / name).touch()
    os.utime(tmp_path / f"{name_of('old')}.1", LONG_AGO)
    os.utime(tmp_path / strays[0], LONG_AGO)
    store.store(name_of("new"), small(100))
    assert names_in(tmp_path) >= {"new", "young", "id-2", strays[1]}
    assert not names_in(tmp_path) & {"old", strays[0], "former"}
    store.store(name_of("new"), small(100))
    assert "id-1" not in names_in(tmp_path)


def test_files_of_others_in_the_folder_stay(tmp_path: Path) -> None:
    names = ["vmlinuz", "notes.1", ".hidden.tmp", "id-card", "id-1", f"{'a' * 63}.1", "b" * 64]
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, LONG_AGO)
    (tmp_path / "dead").symlink_to("nowhere")
    for _ in "12":
        assert Cache(tmp_path).store(name_of("new"), small(100))
    assert {path.name for path in tmp_path.iterdir()} >= {*names}
    assert (tmp_path / "dead").is_symlink()
