"""What cannot be recorded or replayed is refused, before or when it is done."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import pykvm
from pykvm import result as reasons
from pykvm.debug.input_log import InputLog
from pykvm.devices.access import PioAccess
from pykvm.errors import BusyError, ReplayError, SnapshotError

ENTRY = 0x8000


@pytest.fixture
def machine() -> Iterator[pykvm.Machine]:
    with pykvm.Machine("256K") as m:
        yield m


def start(m: pykvm.Machine, code: str, **options: int) -> None:
    m.load(pykvm.asm(code, mode="long64", at=ENTRY), at=ENTRY)
    m.cpu.enter("long64", entry=ENTRY, **options)


def test_machines_that_cannot_be_recorded_are_refused() -> None:
    for options, why in (({"cpus": 2}, "several vCPUs"), ({"irqchip": "split"}, "interrupt")):
        with (
            pykvm.Machine("256K", **options) as m,
            pytest.raises(ReplayError, match=why),
            m.record(),
        ):
            pass
    with pykvm.Machine("256K") as m:
        m.virtio(pykvm.virtio.Rng())
        with pytest.raises(ReplayError, match="virtio"), m.record():
            pass


def test_a_replay_begins_where_its_log_does(machine: pykvm.Machine) -> None:
    start(machine, "in al, 0x40; hlt")
    machine.on_pio(0x40, lambda access: 1)
    with machine.record() as log:
        machine.run(timeout=20)
    with pytest.raises(ReplayError, match="begins where rax is 0x0, and here it is 0x1"):
        machine.replay(log)
    with pykvm.Machine("512K") as other, pytest.raises(ReplayError, match="memory map"):
        other.replay(log)


def test_what_no_log_can_hold_is_refused_when_it_is_done(machine: pykvm.Machine) -> None:
    start(machine, "in al, 0x40; hlt")

    @machine.on_pio(0x40)
    def port(access: PioAccess) -> int:
        machine.cpu.vcpu.set_tsc_khz(machine.cpu.vcpu.get_tsc_khz())
        return 1

    with machine.snapshot() as s:
        with pytest.raises(ReplayError, match="KVM_SET_TSC_KHZ"), machine.record():
            machine.run(timeout=20)
        with pytest.raises(SnapshotError, match="recorded"), machine.record():
            s.restore()
        with pytest.raises(ReplayError, match="already"), machine.record(), machine.record():
            pass
        s.restore()  # and all of that left nothing behind
    claim = machine.pio.find(0x40)
    assert claim is not None
    claim.release()
    machine.pio.constant(0x40, 2)
    with machine.record() as log:
        assert machine.run(timeout=20).reason == reasons.HALTED
    assert log.exits == 2


def test_a_log_has_its_limit(machine: pykvm.Machine) -> None:
    start(machine, "l: in al, 0x40; jmp l")
    machine.pio.constant(0x40, 1)
    with pytest.raises(ReplayError, match="limit=100000"), machine.record(limit=100_000):
        machine.run(timeout=60)
    start(machine, "hlt")
    with machine.record(limit=100_000) as log:  # it can be recorded again
        assert machine.run(timeout=20).reason == reasons.HALTED
    assert [entry.what for entry in log] == ["hlt"]


def test_memory_written_while_the_guest_runs_is_refused(machine: pykvm.Machine) -> None:
    start(machine, "l: in al, 0x40; jmp l")
    machine.pio.constant(0x40, 1)
    with pytest.raises(ReplayError, match="cannot be replayed: memory"), machine.record():
        running = machine.start(timeout=60)
        with pytest.raises(ReplayError, match="while the guest ran"):
            machine.memory.u8[0x20000] = 1
        running.stop()
    with pytest.raises(BusyError):
        recorder = machine.record()
        with recorder:
            running = machine.start(timeout=60)
    running.stop()
    recorder.__exit__(None, None, None)
    assert isinstance(recorder.log, InputLog)
