"""A machine's state, taken at rest: ``Machine.snapshot()``."""

from __future__ import annotations

from pykvm import snapshot_cpuid as cpuid_of
from pykvm.errors import SnapshotError
from pykvm.snapshot import claims as claims_of
from pykvm.snapshot import devices as devices_of
from pykvm.snapshot import image as images
from pykvm.snapshot import served as served_by
from pykvm.snapshot import unseen as unseen_by
from pykvm.snapshot import vcpu as vcpus
from pykvm.snapshot import vm as vms
from pykvm.snapshot_at_rest import check_idle, hooks_of, quiet
from pykvm.snapshots import Snapshot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.machine import Machine
    from pykvm.snapshot.image import Image


def take(machine: Machine) -> Snapshot:
    """See ``Machine.snapshot``."""
    check_idle(machine)
    unseen: dict[int, dict[str, Any]] = {}
    try:
        snapshot = _take(machine, unseen)
    finally:
        for index, item in unseen.items():
            unseen_by.hand_out(machine._runners[index].c, item)
    snapshot.halted = [n for n, runner in enumerate(machine._runners) if runner.halted]
    snapshot.unseen = unseen
    snapshot._machine = machine
    snapshot.served = served_by.capture((machine.pio, machine.mmio), hooks_of(machine))
    snapshot.cpuid = cpuid_of.as_text(machine.cpu)
    snapshot.tsc_khz = cpuid_of.tsc_khz(machine)
    if machine.pc is not None:
        snapshot.boot_plan = machine.pc.plan
        if machine.pc.identity is not None:
            snapshot.identity = machine.pc.identity.gpa
    return snapshot


def _take(machine: Machine, unseen: dict[int, dict[str, Any]]) -> Snapshot:
    """The state itself; ``unseen`` gets what was written and is still to be told of."""
    with quiet(machine):
        for index, (runner, cpu) in enumerate(zip(machine._runners, machine.cpus, strict=True)):
            if not runner.halted:  # nothing is open then, and it is to be told again
                given_up = unseen_by.Unseen(runner.c)
                runner.complete(given_up.see)
                item = given_up.item()
                if item is not None:
                    unseen[index] = item
            cpu.flush()
        irqchip = machine.irqchip is not None
        kernel = irqchip and machine.options["irqchip"] == "kernel"
        states = [vcpus.capture(runner.vcpu, irqchip) for runner in machine._runners]
        found = devices_of.find((machine.pio, machine.mmio))
        try:
            devices = devices_of.capture(found)
        except ValueError as error:
            raise SnapshotError(f"a device cannot be captured: {error}") from error
        return Snapshot(
            dict(machine.options),
            states,
            vms.capture(machine.vm, kernel, bool(machine.options["pit"])),
            devices,
            claims_of.capture((machine.pio, machine.mmio)),
            [(cpu.entered, cpu.ended) for cpu in machine.cpus],
            _memory(machine),
            is_pc=machine.pc is not None,
        )


def _memory(machine: Machine) -> Image:
    """An image without the stops that a debugger has planted."""
    if machine._debugger is None:
        return images.capture(machine.memory)
    with machine._debugger.planted.lifted():
        return images.capture(machine.memory)
