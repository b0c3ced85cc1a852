"""A snapshot taken while the guest's own guest (L2) runs: it goes on there, and ends in L1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import pykvm
from pykvm import result as reasons
from pykvm._abi import lib
from pykvm.snapshot import vcpu as vcpus
from tests.support import svm_guest as svm

SVM = 1 << 2
"""CPUID 0x80000001 ECX."""


@pytest.fixture
def machine() -> Iterator[pykvm.Machine]:
    with pykvm.Machine("512K") as m:
        if not m.vm.check_extension("KVM_CAP_NESTED_STATE"):
            pytest.skip("KVM_CHECK_EXTENSION(KVM_CAP_NESTED_STATE) = 0")
        leaves = {entry.function: entry for entry in m.kvm.get_supported_cpuid()}
        if not leaves[0x80000001].ecx & SVM:
            pytest.skip("KVM_GET_SUPPORTED_CPUID(0x80000001).ecx has no SVM")
        yield m


def in_l2(s: pykvm.Snapshot) -> bool:
    """Whether the vCPU was in L2, by KVM's own word."""
    nested = s.vcpus[0].struct("nested")
    return bool(nested.flags & lib.KVM_STATE_NESTED_GUEST_MODE)


def test_l2_returns_to_l1(machine: pykvm.Machine) -> None:
    svm.enter(machine, svm.SPEAKS)
    machine.pio.ignore(svm.SAID)
    machine.memory.u64[svm.GO] = 1
    result = machine.run(timeout=20)
    assert result.reason == reasons.STOPPED
    assert machine.memory.u64[svm.EXIT_CODE] == svm.VMEXIT_HLT
    assert machine.cpu.rcx == 1


def to_l2(m: pykvm.Machine, guest: str) -> None:
    """Run until L2 has been at work, and stop there."""
    svm.enter(m, guest)
    if guest is svm.SPINS:
        while not m.memory.u64[svm.COUNT]:
            assert m.run(timeout=0.2).reason == reasons.TIMEOUT
        return
    turns: list[int] = []

    @m.on_pio(svm.SAID)
    def said(access: object) -> None:
        turns.append(1)
        if len(turns) == 3:
            m.stop()

    assert m.run(timeout=20).reason == reasons.STOPPED
    assert m.memory.u64[svm.COUNT] == 3


def finish(m: pykvm.Machine, least: int) -> None:
    """L2 is told to end: it does, and L1 has what it counted."""
    m.memory.u64[svm.GO] = 1
    assert m.run(timeout=20).reason == reasons.STOPPED
    assert m.memory.u64[svm.EXIT_CODE] == svm.VMEXIT_HLT
    assert m.cpu.rcx == m.memory.u64[svm.COUNT] >= least
    assert m.cpu.rip in (svm.ENTRY + len(code()) - 3, svm.ENTRY + len(code()) - 1)  # OUT, or HLT


def code() -> bytes:
    return bytes(pykvm.asm(svm.L1_CODE, mode="long64"))


@pytest.mark.parametrize("guest", ["SPEAKS", "SPINS"])
def test_a_snapshot_in_l2_goes_on_in_l2(machine: pykvm.Machine, guest: str, tmp_path: Path) -> None:
    to_l2(machine, getattr(svm, guest))
    with machine.snapshot() as s:
        assert in_l2(s)
        assert svm.L2 <= s.regs().rip < svm.L2 + 0x100
        count = machine.memory.u64[svm.COUNT]
        assert machine.memory.u64[svm.EXIT_CODE] == 0
        s.save(tmp_path / "l2.snapshot")
        finish(machine, count)
        with machine.snapshot() as after:
            assert not in_l2(after)
        for _ in range(3):  # from L1 back into L2, in place
            s.restore()
            with machine.snapshot() as now:
                assert in_l2(now) and not s.diff(now), s.diff(now)
            finish(machine, count)

    def quiet(m: pykvm.Machine) -> None:
        m.pio.ignore(svm.SAID)

    with pykvm.Snapshot.load(tmp_path / "l2.snapshot") as loaded:
        assert in_l2(loaded)
        with loaded.fork(quiet) as other:
            with other.snapshot() as now:
                assert not loaded.diff(now), loaded.diff(now)
            assert other.run(timeout=0.2).reason == reasons.TIMEOUT  # L2 goes on
            assert other.memory.u64[svm.COUNT] > count
            finish(other, count)


def test_a_snapshot_from_before_any_l2_leaves_l2(machine: pykvm.Machine) -> None:
    svm.enter(machine, svm.SPINS)
    with machine.snapshot() as s:
        s.restore()  # the way back is settled when there is no nested state yet
        for _ in range(3):
            while not machine.memory.u64[svm.COUNT]:
                assert machine.run(timeout=0.2).reason == reasons.TIMEOUT
            with machine.snapshot() as now:
                assert in_l2(now)
            s.restore()
            with machine.snapshot() as now:
                assert not in_l2(now) and not s.diff(now), s.diff(now)
        machine.memory.u64[svm.GO] = 1
        finish(machine, 1)


def test_a_reset_without_nested_state_is_found(
    machine: pykvm.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_l2(machine, svm.SPEAKS)
    with machine.snapshot() as s:
        finish(machine, 3)
        monkeypatch.setattr(vcpus, "ORDER", [name for name in vcpus.ORDER if name != "nested"])
        s.restore()
        with machine.snapshot() as now:
            assert not in_l2(now)
            assert any(change.name.startswith("nested") for change in s.diff(now).registers)
