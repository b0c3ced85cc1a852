"""A clone is another machine, if its guest can take that: the VM generation ID, in tiny guests."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest

import pykvm
from pykvm import result as reasons
from pykvm import snapshot_pool
from pykvm.arch.x86_64 import pc
from pykvm.errors import SnapshotError
from pykvm.snapshot import file
from tests.support.interrupts import guest, ioapic_entry
from tests.support.kernels import PREF, elf

GENEROUS = 60.0
VECTOR = 0x31
TOLD, TICKED = 0x42, 0x43
IDLING = 0x41

# It says by port that it waits; then what it is told, by interrupt, or that it was told nothing.
KERNEL = guest(
    VECTOR,
    ioapic_entry(pc.IDENTITY_GSI, VECTOR),
    f"mov dword ptr [rbx + EOI], 0; mov al, {TOLD}; out 0xf4, al; iretq",
    idle=f"mov al, {IDLING}; out 0xf4, al; mov ecx, 200; 1: dec ecx; jnz 1b;"
    f"mov al, {TICKED}; out 0xf4, al",
)

both = pytest.mark.parametrize(
    "irqchip",
    [
        pytest.param("kernel", marks=pytest.mark.cap("KVM_CAP_IRQCHIP")),
        pytest.param("split", marks=pytest.mark.cap("KVM_CAP_SPLIT_IRQCHIP")),
    ],
)
FIRST = bytes(range(16))


def kernel() -> bytes:
    code = bytes(pykvm.asm(KERNEL, at=PREF))
    return elf([(PREF, code, len(code))])


def until(m: pykvm.Machine) -> int | None:
    result = m.run(timeout=GENEROUS)
    assert result.reason == reasons.DEBUG_EXIT, result
    return result.code


def booted(irqchip: str, **options: Any) -> pykvm.Machine:
    """A machine that waits to be told."""
    m = pykvm.Machine("8M", irqchip=irqchip)
    m.debug_exit()
    m.boot(kernel(), cmdline="", **options)
    assert until(m) == IDLING
    return m


def place(m: pykvm.Machine) -> int:
    assert m.pc is not None and m.pc.identity is not None
    return m.pc.identity.gpa


def identity(m: pykvm.Machine) -> bytes:
    return bytes(m.memory.read(place(m), 16))


@both
def test_a_fork_is_told_that_it_is_another(irqchip: str) -> None:
    with booted(irqchip, identity=FIRST) as m, m.snapshot() as s:
        assert identity(m) == FIRST
        seen = set()
        for _ in range(2):
            with s.fork() as clone:
                seen.add(identity(clone))
                assert until(clone) == TOLD
                assert until(clone) == TICKED  # once
        assert len(seen) == 2 and FIRST not in seen
        assert s.read(place(m), 16) == FIRST == identity(m)
        assert until(m) == TICKED  # the original goes on untold


@both
def test_one_that_keeps_its_identity_is_told_nothing(irqchip: str) -> None:
    with booted(irqchip) as m, m.snapshot() as s:
        with s.fork(identity="keep") as clone:
            assert identity(clone) == identity(m)
            with clone.snapshot() as again:
                change = s.diff(again)  # the ACPI timer runs on
            assert not change.pages and not change.registers
            assert until(clone) == TICKED
        for given in (FIRST, uuid.UUID(bytes_le=FIRST)):
            with s.fork(identity=given) as clone:
                assert identity(clone) == FIRST
                assert until(clone) == TOLD


def test_a_reset_is_exact_unless_asked() -> None:
    with booted("kernel", identity=FIRST) as m, m.snapshot() as s:
        for _ in range(2):
            s.restore()
            assert identity(m) == FIRST and until(m) == TICKED
            s.restore(identity="new")
            assert identity(m) != FIRST and until(m) == TOLD
        with s.fork() as clone:  # restored, a clone is the original again
            s.restore(clone)
            assert identity(clone) == FIRST and until(clone) == TICKED
        with pytest.raises(ValueError, match='"new", "keep"'):
            s.restore(identity="other")
        with pytest.raises(ValueError, match="16 bytes"):
            s.fork(identity=b"short")


def test_it_is_in_files_and_old_files_have_none(tmp_path: Path) -> None:
    with booted("kernel", identity=FIRST) as m, m.snapshot() as s:
        s.save(tmp_path / "new")
        old = s._header()
        assert old.pop("identity") == place(m)
        for name, header in (
            ("old", old),
            ("nowhere", {**old, "identity": 1 << 40}),
            ("odd", {**old, "identity": place(m) + 4}),
            ("text", {**old, "identity": "0xe0080"}),
        ):
            file.save(header, s.image, str(tmp_path / name), None)
    with pykvm.Snapshot.load(tmp_path / "new") as loaded, loaded.fork() as clone:
        assert identity(clone) != FIRST and until(clone) == TOLD
    with pykvm.Snapshot.load(tmp_path / "old") as loaded:
        with loaded.fork() as clone:
            assert clone.pc is not None and clone.pc.identity is None
            assert until(clone) == TICKED
        with pytest.raises(SnapshotError, match="no VM generation ID"):
            loaded.fork(identity=FIRST)
    for name in ("nowhere", "odd", "text"):
        with pytest.raises(SnapshotError, match="no VM generation ID can be at"):
            pykvm.Snapshot.load(tmp_path / name)


def test_without_the_device_a_clone_is_not_told() -> None:
    with booted("kernel", identity=None) as m, m.snapshot() as s:
        assert m.pc is not None and m.pc.identity is None
        assert b"VM_Gen_Counter" not in bytes(m.memory.read(pc.ACPI_BASE, 0x2000))
        with s.fork() as clone:
            assert until(clone) == TICKED
        with pytest.raises(SnapshotError, match="no VM generation ID"):
            s.restore(identity=FIRST)
    with pykvm.Machine("8M", irqchip=True) as m, pytest.raises(ValueError, match="keep"):
        m.boot(kernel(), identity="keep")


def test_a_running_guest_can_be_given_another() -> None:
    with booted("kernel") as m:
        assert m.pc is not None and m.pc.identity is not None
        assert b"VM_Gen_Counter" in bytes(m.memory.read(pc.ACPI_BASE, 0x2000))
        m.pc.identity.change()
        assert until(m) == TOLD


def test_a_pools_machines_are_the_snapshots_own(tmp_path: Path) -> None:
    """What a pool's process does, in this one: Python takes long to start in the rig."""
    with booted("kernel", identity=FIRST) as m, m.snapshot() as s:
        s.save(tmp_path / "saved")
    snapshot_pool._begin(str(tmp_path / "saved"), s.id, None)
    ((loaded, machine),) = snapshot_pool._mine
    snapshot_pool._mine.clear()
    with loaded, machine:
        assert identity(machine) == FIRST and until(machine) == TICKED
