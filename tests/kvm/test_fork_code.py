"""What a fork lacks of the machine that it is of: code, which no snapshot has, is named."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import pykvm
from pykvm import result as reasons
from pykvm.errors import SnapshotError
from pykvm.virtio import Rng

ENTRY = 0x8000


@pytest.fixture
def machine() -> Iterator[pykvm.Machine]:
    with pykvm.Machine("4M") as m:
        m.load(pykvm.asm("in al, 0x60; hlt", mode="long64"), at=ENTRY)
        m.cpu.enter("long64", entry=ENTRY)
        yield m


class Thing:
    def access(self, access: object) -> int:
        return 0x5A

    def state(self) -> dict[str, int]:
        return {}

    def restore(self, state: dict[str, int]) -> None:
        pass


def hello(access: object) -> int:
    return 0x42


def halted(exit: object) -> bool:
    return False


def test_a_fork_without_handlers_says_which_and_what_to_do(
    machine: pykvm.Machine, tmp_path: Path
) -> None:
    machine.on_pio(0x60, hello, count=4)
    machine.on_mmio(0x1000_0000, 0x100, hello)
    machine.on_hlt(halted)
    machine.pio.constant(0x70, 1)  # C's: comes along
    with machine.snapshot() as s:
        s.save(tmp_path / "saved")
    with pykvm.Snapshot.load(tmp_path / "saved") as s:
        with pytest.warns(RuntimeWarning) as told, s.fork() as fork:
            assert fork.run(timeout=10).reason == reasons.UNCLAIMED
        (warning,) = told
        text = str(warning.message)
        assert "hello at pio 0x60..0x63, hello at mmio 0x10000000..0x100000ff" in text
        assert "halted at exit hlt" in text and "0x70" not in text
        assert "fork(setup)" in text and "machine.pio.ignore" in text
        assert warning.filename == __file__

        def setup(m: pykvm.Machine) -> None:
            m.on_pio(0x60, hello, count=4)
            m.mmio.ignore(0x1000_0000, 0x100)
            m.on_hlt(halted)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with s.fork(setup) as fork:
                assert fork.run(timeout=10).reason == reasons.HALTED
                assert fork.cpu.al == 0x42


def test_a_fork_without_devices_names_their_ranges(machine: pykvm.Machine) -> None:
    thing = Thing()
    machine.on_pio(0x300, thing.access, count=8)
    machine.virtio(Rng(), transport="mmio")
    with machine.snapshot() as s, pytest.raises(SnapshotError) as error:
        s.fork()
    text = str(error.value)
    assert "Thing at pio 0x300..0x307" in text and "fork(setup)" in text
    assert re.search(r"Rng at mmio 0xd0000000\.\.0xd00000", text), text


@pytest.mark.cap("KVM_CAP_IRQCHIP")
def test_a_fork_without_pci_devices_names_them() -> None:
    with pykvm.Machine("4M", irqchip=True) as m:
        m.virtio(Rng())
        with m.snapshot() as s:
            with pytest.raises(SnapshotError, match=r"Rng at pci 0x1"):
                s.fork()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                s.fork(lambda other: other.virtio(Rng())).close()
