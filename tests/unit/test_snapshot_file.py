"""Files of snapshots that were changed: refused with a reason, whatever was changed."""

from __future__ import annotations

import errno
import gc
import json
import mmap
import os
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykvm._abi import ffi
from pykvm.errors import SnapshotError
from pykvm.memory import GuestMemory
from pykvm.snapshot import file as files
from pykvm.snapshot import image as images
from pykvm.snapshot import vmcore
from pykvm.snapshot.vcpu import STRUCTS, VcpuState

SLOW = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a little memory, and one built upon it."""
    folder = tmp_path_factory.mktemp("snapshots")
    with GuestMemory("64K") as memory:
        memory.add(0x100000, "16K", name="rom", readonly=True)
        memory.write(0x1000, b"one" * 2000)
        memory.write(0xF000, b"end")
        image = images.capture(memory)
        files.save({"id": "a" * 32, "options": {}}, image, str(folder / "base"), None)
        memory.write(0x1000, b"two")
        with_more = images.capture(memory)
        below = str(folder / "base"), "a" * 32, image
        files.save({"id": "b" * 32}, with_more, str(folder / "top"), below)
        image.close()
        with_more.close()
    return folder


def contents(image: images.Image) -> list[bytes]:
    return [image.read(part.gpa, part.size) for part in image.parts]


def test_what_was_saved_is_loaded(saved: Path) -> None:
    header, image = files.load(str(saved / "base"), True)
    assert header["id"] == "a" * 32
    assert image.read(0x1000, 3) == b"one" and image.read(0xF000, 3) == b"end"
    assert [part.place for part in image.parts] == [
        (0, 0, 0x10000, False),
        (1, 0x100000, 0x4000, True),
    ]
    _, top = files.load(str(saved / "top"), True)
    assert top.read(0x1000, 6) == b"twoone" and top.read(0xF000, 3) == b"end"
    image.close()
    top.close()


@SLOW
@given(data=st.data())
@pytest.mark.parametrize("name", ["base", "top"])
def test_a_changed_file_is_the_same_or_refused(
    saved: Path, tmp_path: Path, name: str, data: st.DataObject
) -> None:
    good = (saved / name).read_bytes()
    _, image = files.load(str(saved / name), True)
    expected = contents(image)
    image.close()
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(changed) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "flip":
            changed[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del changed[at:]
        else:
            changed[at:at] = data.draw(st.binary(min_size=1, max_size=16))
        if not changed:
            break
    target = saved / "changed"
    target.write_bytes(changed)
    try:
        _, image = files.load(str(target), True)
    except SnapshotError as error:
        assert str(error)
        return
    assert contents(image) == expected
    image.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def forged(good: bytes, change: Any) -> bytes:
    """The file with another header, and a checksum that fits it."""
    line, _, rest = good.partition(b"\n")
    length = int(line.split(b" ")[2])
    header = json.loads(rest[:length])
    change(header)
    text = json.dumps(header).encode()
    head = b"%s 1 %d %s\n" % (files.MAGIC, len(text), files._digest(text))
    body = good[files._start(len(line) + 1, length) :]
    return (head + text).ljust(files._start(len(head), len(text)), b"\0") + body


@SLOW
@given(data=st.data())
def test_a_forged_header_is_refused_or_makes_sense(saved: Path, data: st.DataObject) -> None:
    good = (saved / "base").read_bytes()

    def change(header: Any) -> None:
        where = header["memory"]["parts"][data.draw(st.integers(0, 1))]
        key = data.draw(st.sampled_from([*where, "base", "memory"]))
        target = where if key in where else header
        numbers = st.sampled_from([0, 1, 4095, 4096, 1 << 20, 1 << 40, 1 << 52, 1 << 63, -1])
        target[key] = data.draw(JSON | numbers)

    target = saved / "forged"
    target.write_bytes(forged(good, change))
    try:
        _, image = files.load(str(target), data.draw(st.booleans()))
    except SnapshotError:
        return
    assert [len(each) for each in contents(image)] == [part.size for part in image.parts]
    image.close()


def held(path: Path) -> bytes:
    """The map of the first region's pages, packed."""
    line, _, rest = path.read_bytes().partition(b"\n")
    header = json.loads(rest[: int(line.split(b" ")[2])])
    return b64decode(header["memory"]["parts"][0]["held"])


def test_memory_that_is_not_used_costs_loading_nothing(tmp_path: Path) -> None:
    with GuestMemory("1G") as memory:
        memory.write(0x41000, b"x")
        image = images.capture(memory)
        files.save({"id": "a" * 32}, image, str(tmp_path / "low"), None)
        memory.write((1 << 30) - 1, b"y")
        above = images.capture(memory)
        files.save({"id": "b" * 32}, above, str(tmp_path / "high"), None)
        image.close()
        above.close()
    assert zlib.decompress(held(tmp_path / "low")) == bytes(8) + b"\2"
    for name, last in (("low", b"\0"), ("high", b"y")):
        _, image = files.load(str(tmp_path / name), True)
        assert image.read(0x41000, 1) == b"x" and image.read((1 << 30) - 1, 1) == last
        image.close()


@pytest.mark.parametrize("change", [lambda packed: packed[:-5], lambda _: zlib.compress(bytes(9))])
def test_a_map_of_pages_that_is_none_is_refused(
    saved: Path, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    def forge(header: Any) -> None:
        part = header["memory"]["parts"][0]
        part["held"] = part["pages"] = b64encode(change(b64decode(part["held"]))).decode()

    (tmp_path / "forged").write_bytes(forged((saved / "base").read_bytes(), forge))
    with pytest.raises(SnapshotError, match="a map of pages is not one of its region"):
        files.load(str(tmp_path / "forged"), False)


def test_a_chain_in_a_circle_ends(saved: Path) -> None:
    good = (saved / "top").read_bytes()

    def change(header: Any) -> None:
        header["base"] = {"path": "circle", "id": "b" * 32}

    (saved / "circle").write_bytes(forged(good, change))
    with pytest.raises(SnapshotError, match="chain has more than"):
        files.load(str(saved / "circle"), False)


def closed_twice(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """File descriptors that were closed when they were not open: it may be somebody else's then."""
    wrong: list[int] = []
    real = os.close

    def close(fd: int) -> None:
        try:
            real(fd)
        except OSError:
            wrong.append(fd)

    monkeypatch.setattr(os, "close", close)
    return wrong


def test_an_image_that_cannot_be_mapped_leaves_nothing_open_and_closes_nothing_twice(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*arguments: Any) -> Any:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    before = os.listdir("/proc/self/fd")
    wrong = closed_twice(monkeypatch)
    with GuestMemory("64K") as memory:
        monkeypatch.setattr(mmap, "mmap", no_room)
        with pytest.raises(OSError, match="allocate memory"):
            images.capture(memory)
    with pytest.raises(OSError, match="allocate memory"):
        files.load(str(saved / "base"), False)
    gc.collect()
    monkeypatch.undo()
    assert not wrong
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("left", range(8))
def test_a_process_that_may_open_no_more_files_has_none_more_open(
    saved: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    real, calls = os.dup, []

    def dup(fd: int) -> int:
        calls.append(fd)
        if len(calls) > left:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(fd)

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, "dup", dup)
    try:
        files.load(str(saved / "top"), False)[1].close()
    except OSError as error:
        assert error.errno == errno.EMFILE and len(calls) == left + 1
    except SnapshotError as error:
        assert "Too many open files" in str(error)
    else:
        assert len(calls) == left or left > 3
    monkeypatch.undo()
    gc.collect()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"slot": 1}, "nowhere"),
        ({"size": 1 << 43, "held": "", "pages": ""}, "larger than KVM takes"),
    ],
)
def test_regions_that_no_machine_can_have_are_refused(
    saved: Path, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    def forge(header: Any) -> None:
        first, second = header["memory"]["parts"]
        (first if "slot" in change else second).update(change)

    (tmp_path / "forged").write_bytes(forged((saved / "base").read_bytes(), forge))
    with pytest.raises(SnapshotError, match=reason):
        files.load(str(tmp_path / "forged"), False)


# ---- states of vCPUs -----------------------------------------------------------------------------


def test_the_state_of_a_vcpu_survives_json() -> None:
    regs = ffi.new("struct kvm_regs *", {"rip": 0x1234})
    state = VcpuState(
        {"regs": bytes(ffi.buffer(regs))}, {0x10: 5, 0xC0000080: 1 << 63}, (1 << 63, 7)
    )
    again = files.vcpu_of_json(json.loads(json.dumps(files.vcpu_to_json(state))))
    assert again.parts == state.parts and again.msrs == state.msrs and again.tsc == state.tsc
    assert again.struct("regs").rip == 0x1234


@pytest.mark.parametrize("more", [-8, 8, 4096])
@pytest.mark.parametrize("name", ["regs", "sregs", "events"])
def test_a_part_of_another_size_is_refused(name: str, more: int) -> None:
    size = ffi.sizeof(STRUCTS[name][0])
    with pytest.raises(ValueError, match=f"{name} has {size + more} bytes"):
        files.vcpu_of_json({"parts": {name: "00" * (size + more)}, "msrs": {}, "tsc": None})


@given(JSON)
def test_what_is_no_state_is_refused(said: Any) -> None:
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError, IndexError)):
        files.vcpu_of_json({"parts": {"regs": said}, "msrs": {}, "tsc": None})


# ---- core files ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def core(saved: Path) -> bytes:
    _, image = files.load(str(saved / "base"), True)
    parts = {
        "regs": bytes(ffi.buffer(ffi.new("struct kvm_regs *", {"rip": 0x1000}))),
        "sregs": bytes(ffi.buffer(ffi.new("struct kvm_sregs *", {"cr3": 0x2000}))),
    }
    vmcore.dump(image, [VcpuState(parts, {}, None)], str(saved / "core"))
    image.close()
    return (saved / "core").read_bytes()


def read(saved: Path, data: bytes) -> vmcore.Core:
    (saved / "read").write_bytes(data)
    fd = os.open(saved / "read", os.O_RDONLY)
    try:
        return vmcore.read(fd, "it")
    finally:
        os.close(fd)


def test_a_core_file_has_what_was_put_in(saved: Path, core: bytes) -> None:
    found = read(saved, core)
    assert [(gpa, size) for gpa, size, _, _ in found.segments] == [(0, 0x10000), (0x100000, 0x4000)]
    (cpu,) = found.cpus
    assert cpu["rip"] == 0x1000 and cpu["cr3"] == 0x2000
    _, _, offset, _ = found.segments[0]
    assert core[offset + 0x1000 :][:3] == b"one"


@SLOW
@given(data=st.data())
def test_a_changed_core_file_is_read_or_refused(
    saved: Path, core: bytes, data: st.DataObject
) -> None:
    changed = bytearray(core)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 1500))
        changed[at] = data.draw(st.integers(0, 255))
    try:
        found = read(saved, bytes(changed[: data.draw(st.sampled_from([100, 2000, len(changed)]))]))
    except SnapshotError:
        return
    for gpa, size, offset, length in found.segments:
        assert gpa + size <= 1 << 52 and offset + length <= len(changed)
