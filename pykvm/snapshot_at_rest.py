"""A machine at rest: nobody runs it, its I/O threads are held; and the plan to put it back."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

from pykvm.errors import BusyError, ClosedError, SnapshotError
from pykvm.snapshot import served as served_by
from pykvm.snapshot.reset import Plan, Tracking

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from pykvm.machine import Machine
    from pykvm.snapshots import Snapshot


def check_idle(machine: Machine) -> None:
    """Raise ClosedError or BusyError for a machine that is neither taken nor put back now."""
    if machine.closed:
        raise ClosedError("this machine is closed")
    if machine.running:
        raise BusyError("a vCPU of this machine is running: stop() it first")


@contextmanager
def quiet(machine: Machine) -> Iterator[None]:
    """Hold the machine's I/O threads still, after they did what was asked of them."""
    with ExitStack() as held:
        if machine._virtio is not None:
            for thread in machine._virtio.threads:
                thread.settle()
                held.enter_context(thread.quiesce())
        yield


def plan_of(machine: Machine, snapshot: Snapshot) -> Plan:
    """How the machine is put back to the snapshot; the last one is kept."""
    if machine._tracking is None:
        machine._tracking = Tracking(machine.vm, machine.memory)
    known = machine._plan
    if known is not None and known[0] is snapshot:
        return known[1]
    plan = make_plan(machine, snapshot, machine._tracking)
    machine._plan = snapshot, plan
    return plan


def make_plan(machine: Machine, snapshot: Snapshot, tracking: Tracking | None) -> Plan:
    """How a machine is put back, by what was written since or, without tracking, as a whole.

    Raises:
        SnapshotError: it has another interrupt controller.
    """
    if machine.options["irqchip"] != snapshot.options["irqchip"]:
        raise SnapshotError("the snapshot's interrupt controller is another than the machine's")
    cpus = [(runner.vcpu, runner.c) for runner in machine._runners]
    irqchip = machine.irqchip is not None
    return Plan(machine.vm, cpus, tracking, snapshot.vcpus, snapshot.vm, snapshot.image, irqchip)


def hooks_of(machine: Machine) -> dict[str, dict[int, Any]]:
    """Its handlers of MSRs and exits, by their kind."""
    return {served_by.MSR: machine._msrs, served_by.EXIT: machine._hooks}


def tell_identity(machine: Machine, value: bytes | None) -> None:
    """After all is back: write the ID into the machine's own memory, and tell the guest."""
    if value is not None:
        assert machine.pc is not None and machine.pc.identity is not None
        machine.pc.identity.change(value)
