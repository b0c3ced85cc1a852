"""Snapshots where there is no KVM: all but making a machine of them works."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pykvm._abi import ffi
from pykvm.errors import CapabilityError, SnapshotError
from pykvm.memory import GuestMemory
from pykvm.snapshot import image as images
from pykvm.snapshot import vmcore
from pykvm.snapshot.vcpu import VcpuState
from pykvm.snapshots import Snapshot
from tests.unit.test_snapshot_file import forged

OPTIONS = {
    "cpus": 1, "irqchip": None, "pit": False, "pic": "reset", "features": "", "cpuid": "host",
    "path": "/dev/kvm",
}  # fmt: skip
UNSEEN = {"on": "pio", "address": 0xF4, "is_write": True, "size": 1, "data": "2a2b"}
LEAF = "0d000000" + "00" * 36


@pytest.fixture(autouse=True)
def no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens /dev/kvm is told that there is none."""
    real = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if path == "/dev/kvm":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)


def snapshot(memory: GuestMemory, rip: int) -> Snapshot:
    structs = {
        "regs": ffi.new("struct kvm_regs *", {"rip": rip}),
        "sregs": ffi.new("struct kvm_sregs *", {"cr3": 0x2000}),
    }
    state = VcpuState({n: bytes(ffi.buffer(each)) for n, each in structs.items()}, {1: 2}, None)
    image = images.capture(memory)
    made = Snapshot(dict(OPTIONS), [state], {}, {"0x3f8": {"lcr": 3}}, [], [(True, "")], image)
    made.cpuid = [LEAF]
    made.unseen = {0: UNSEEN}
    return made


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two snapshots in files, the second built upon the first."""
    with GuestMemory("64K") as memory:
        memory.write(0x1000, b"before")
        with snapshot(memory, 0x8000) as first:
            first.save(tmp_path / "first")
            memory.write(0x1000, b"after")
            with snapshot(memory, 0x8005) as second:
                second.save(tmp_path / "second", base=first)
    return tmp_path


def test_all_can_be_looked_at(saved: Path) -> None:
    with Snapshot.load(saved / "first") as first, Snapshot.load(saved / "second") as second:
        assert first.options["cpus"] == 1 and first.cpuid == [LEAF] and first.cpus == [(True, "")]
        assert first.regs().rip == 0x8000 and second.sregs().cr3 == 0x2000
        assert first.read(0x1000, 6) == b"before" and second.read(0x1000, 6) == b"aftere"
        assert first.unseen == {0: UNSEEN}
        assert first.devices == {"0x3f8": {"lcr": 3}} and "64K" in repr(first)
        difference = first.diff(second)
        assert difference.pages == [0x1000] and "rip: 0x8000 → 0x8005" in repr(difference)
        second.dump(saved / "core")
        fd = os.open(saved / "core", os.O_RDONLY)
        try:
            (cpu,) = vmcore.read(fd, "it").cpus
        finally:
            os.close(fd)
        assert cpu["rip"] == 0x8005 and cpu["cr3"] == 0x2000
        second.save(saved / "whole")  # a chain made one file again
    with Snapshot.load(saved / "whole") as whole:
        assert whole.read(0x1000, 6) == b"aftere" and whole.cpuid == [LEAF]


def test_a_machine_of_it_is_refused_with_the_remedy(saved: Path) -> None:
    with Snapshot.load(saved / "first") as first:
        for _ in range(2):
            before = os.listdir("/proc/self/fd")
            with pytest.raises(CapabilityError, match="/dev/kvm"):
                first.fork()
            assert os.listdir("/proc/self/fd") == before
        assert first.read(0x1000, 6) == b"before"


@pytest.mark.parametrize(
    "leaves", [[], 7, [7], "00", [LEAF, LEAF[:-2]], ["zz" * 40], [" " * 80], [LEAF[:-2] + "  "]]
)
def test_leaves_that_are_none_are_refused_when_it_is_loaded(saved: Path, leaves: Any) -> None:
    def change(header: Any) -> None:
        header["options"]["cpuid"] = leaves

    assert SENSELESS in refusal(saved, change)


SENSELESS = "forged: the header does not make sense"


def refusal(saved: Path, change: Callable[[Any], None]) -> str:
    """What loading a file with a forged header says; nothing is left open."""
    (saved / "forged").write_bytes(forged((saved / "first").read_bytes(), change))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(SnapshotError) as error:
        Snapshot.load(saved / "forged")
    assert os.listdir("/proc/self/fd") == before
    return str(error.value)


WRONG: list[dict[str, Any]] = [
    {"on": "irq"},
    {"on": []},
    {"address": 1 << 16},
    {"address": -1},
    {"address": 1.5},
    {"size": 0},
    {"size": 3},
    {"size": 8},
    {"size": "1"},
    {"data": ""},
    {"data": "zz"},
    {"data": 7},
    {"data": "00" * 4097},
    {"size": 4, "data": "00" * 6},
    {"on": "mmio", "size": 4, "data": "00" * 8},
    {"on": "mmio", "size": 9, "data": "00" * 9},
    {"on": "mmio", "address": 1 << 52},
]


@pytest.mark.parametrize(
    "said",
    [
        [],
        7,
        {"0": []},
        *({index: UNSEEN} for index in ("1", "-1", "x")),
        *({"0": UNSEEN | wrong} for wrong in WRONG),
    ],
)
def test_an_access_that_is_none_is_refused(saved: Path, said: Any) -> None:
    def change(header: Any) -> None:
        header["unseen"] = said

    assert SENSELESS in refusal(saved, change)


def test_what_older_files_lack_they_had_not(saved: Path) -> None:
    def change(header: Any) -> None:
        del header["unseen"], header["halted"], header["served"]

    (saved / "old").write_bytes(forged((saved / "first").read_bytes(), change))
    with Snapshot.load(saved / "old") as old:
        assert (old.unseen, old.halted, old.served) == ({}, [], [])


@pytest.mark.parametrize(
    "wrong",
    [
        {"cpus": 0},
        {"cpus": 10**9},
        {"cpus": True},
        {"irqchip": "both"},
        {"irqchip": {}},
        {"pit": 1},
        {"pic": "other"},
        {"features": None},
        {"flavour": "new"},
        None,
    ],
)
def test_options_that_no_machine_has_are_refused(saved: Path, wrong: Any) -> None:
    def change(header: Any) -> None:
        header["options"] = None if wrong is None else header["options"] | wrong
        cpus = header["options"] and header["options"]["cpus"]
        if cpus == 0:
            header["vcpus"], header["cpus"] = [], []

    assert SENSELESS in refusal(saved, change)


@pytest.mark.parametrize("tsc", [[], [1], {}, [1.5, 2], "12", [-1, 0]])
def test_a_clock_that_is_none_is_refused(saved: Path, tsc: Any) -> None:
    def change(header: Any) -> None:
        header["vcpus"][0]["tsc"] = tsc

    assert SENSELESS in refusal(saved, change)


@pytest.mark.parametrize("khz", [float("inf"), float("nan"), None, "fast"])
def test_a_frequency_that_is_none_is_refused(saved: Path, khz: Any) -> None:
    def change(header: Any) -> None:
        header["tsc_khz"] = khz

    assert SENSELESS in refusal(saved, change)
