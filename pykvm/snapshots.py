"""``Snapshot``: a machine at one moment; to go back to, to fork, to compare.

::

    with pykvm.Machine("2M") as m:
        ...
        s = m.snapshot()
        for data in inputs:
            m.mem.write(0x2000, data)
            m.run(timeout=1)
            s.restore()

Time stands still between a snapshot and its restoration, for the guest's TSC, kvmclock and timers;
the host's calendar does not, and a CMOS clock shows it.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager

from pykvm.errors import BusyError, ClosedError, SnapshotError
from pykvm.machine import Machine
from pykvm.memory import GuestMemory
from pykvm.snapshot import claims as claims_of
from pykvm.snapshot import devices as devices_of
from pykvm.snapshot import image as images
from pykvm.snapshot import vcpu as vcpus
from pykvm.snapshot import vm as vms
from pykvm.snapshot.reset import Plan, Tracking

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Any, Self

    from pykvm.snapshot.diff import Diff
    from pykvm.snapshot.image import Image
    from pykvm.snapshot.vcpu import VcpuState

    Setup = Callable[[Machine], object]


class Snapshot:
    """A machine at one moment. ``Machine.snapshot()`` takes it.

    It is a value: it never changes, and outlives its machine. Its memory goes with the last
    reference to it, or with :meth:`close`.

    Attributes:
        options: what the machine was made with, see ``Machine.options``.
        vcpus: the state of each vCPU.
        vm: the state of the VM, KVM's structures by name.
        devices: the state of every device, by its first port or address.
        claims: the ranges that C serves and that a machine can be given again.
        cpus: of each vCPU, whether it was entered and why it cannot go on.
        is_pc: whether it was booted, and so has the devices of a PC.
        image: its memory.
        id: 32 hexadecimal digits that no other snapshot has.
    """

    def __init__(
        self,
        options: dict[str, Any],
        vcpus: list[VcpuState],
        vm: dict[str, bytes],
        devices: dict[str, Any],
        claims: list[dict[str, Any]],
        cpus: list[tuple[bool, str]],
        image: Image,
        *,
        is_pc: bool = False,
        id: str = "",
    ) -> None:
        self.options = options
        self.vcpus = vcpus
        self.vm = vm
        self.devices = devices
        self.claims = claims
        self.cpus = cpus
        self.image = image
        self.is_pc = is_pc
        self.id = id or os.urandom(16).hex()
        self.boot_plan: Any = None
        self._machine: Machine | None = None

    # ---- back ----------------------------------------------------------------------------------

    def restore(self, machine: Machine | None = None) -> None:
        """Put a machine back to this moment, in place.

        Args:
            machine: the one that the snapshot is of, by default; or one that is just like it.

        The first time every page is compared; from then on KVM logs what the guest writes, and only
        that is copied (and what the host wrote through ``m.mem``, and pages under a view of it).

        Raises:
            BusyError: the machine runs.
            SnapshotError: the machine is another.
        """
        machine = machine or self._machine
        if machine is None:
            raise SnapshotError("this snapshot has no machine: fork() it, or say which to restore")
        _check(machine)
        with _quiet(machine):
            plan = plan_of(machine, self)
            if not plan.run():
                for runner in machine._runners:
                    runner.complete()
                if not plan.run():
                    raise SnapshotError("a vCPU does not come to the end of its instruction")
            self.finish(machine, devices_of.find((machine.pio, machine.mmio)))

    def finish(self, machine: Machine, devices: dict[str, Any]) -> None:
        """After KVM's part: devices, and what Python remembers."""
        machine.forget_stop()
        for cpu, (entered, ended) in zip(machine.cpus, self.cpus, strict=True):
            cpu.put_back(entered, ended)
        devices_of.restore(devices, self.devices)
        devices_of.resume(devices)

    def fork(self, setup: Setup | None = None) -> Machine:
        """Make another machine of it, which shares every page of memory until it writes it.

        What C serves (``m.pio.fifo()`` and its like), the devices of a PC, virtio ``Rng`` and
        ``Console`` are made anew. Handlers in Python, other devices and disks are code, or
        belong to the other machine: ``setup`` gives the new one its own, before their state is
        restored.

        Args:
            setup: called with the machine before anything is restored.

        Raises:
            SnapshotError: the snapshot has the state of a device that the machine lacks.
        """
        memory = GuestMemory()
        try:
            self.image.map_into(memory)
            machine = Machine(memory, **self.options)
        except BaseException:
            memory.close()
            raise
        try:
            if setup is not None:
                setup(machine)
            if self.is_pc and machine.pc is None:
                from pykvm.pc import Pc

                machine.pc = Pc(machine)
                machine.pc.plan = self.boot_plan
            claims_of.give(self.claims, (machine.pio, machine.mmio))
            plan = _plan(machine, self, None)
            if not plan.run():
                raise SnapshotError("a vCPU that never ran has an access open")
            with _quiet(machine):
                self.finish(machine, devices_of.find((machine.pio, machine.mmio)))
        except BaseException:
            machine.close()
            raise
        return machine

    # ---- looking -------------------------------------------------------------------------------

    def diff(self, other: Snapshot) -> Diff:
        """What is different in another snapshot: pages, and registers of every kind."""
        from pykvm.snapshot.diff import diff

        return diff(self, other)

    def read(self, gpa: int, length: int) -> bytes:
        """Memory as it was, within one region."""
        return self.image.read(gpa, length)

    def regs(self, cpu: int = 0) -> Any:
        """The general registers of a vCPU: a ``struct kvm_regs *`` of your own."""
        return self.vcpus[cpu].struct("regs")

    def sregs(self, cpu: int = 0) -> Any:
        """The segment and control registers of a vCPU: a ``struct kvm_sregs *`` of your own."""
        return self.vcpus[cpu].struct("sregs")

    # ---- life ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of its memory. Idempotent; machines forked from it go on."""
        machine, self._machine = self._machine, None
        if machine is not None and machine._plan is not None and machine._plan[0] is self:
            machine._plan = None
        self.image.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        from pykvm.memory import format_size

        size = sum(part.size for part in self.image.parts)
        return (
            f"<Snapshot {self.id[:8]} of {len(self.vcpus)} cpus, {format_size(size)}, of which"
            f" {format_size(self.image.held)} are not zeros>"
        )


# ---- taking and restoring ----------------------------------------------------------------------


def take(machine: Machine) -> Snapshot:
    """See ``Machine.snapshot``."""
    _check(machine)
    with _quiet(machine):
        for runner, cpu in zip(machine._runners, machine.cpus, strict=True):
            runner.complete()
            cpu.flush()
        irqchip = machine.irqchip is not None
        kernel = irqchip and machine.options["irqchip"] == "kernel"
        states = [vcpus.capture(runner.vcpu, irqchip) for runner in machine._runners]
        found = devices_of.find((machine.pio, machine.mmio))
        try:
            devices = devices_of.capture(found)
        except ValueError as error:
            raise SnapshotError(f"a device cannot be captured: {error}") from error
        snapshot = Snapshot(
            dict(machine.options),
            states,
            vms.capture(machine.vm, kernel, bool(machine.options["pit"])),
            devices,
            claims_of.capture((machine.pio, machine.mmio)),
            [(cpu.entered, cpu.ended) for cpu in machine.cpus],
            images.capture(machine.memory),
            is_pc=machine.pc is not None,
        )
    snapshot._machine = machine
    if machine.pc is not None:
        snapshot.boot_plan = machine.pc.plan
    return snapshot


def plan_of(machine: Machine, snapshot: Snapshot) -> Plan:
    """How the machine is put back to the snapshot; the last one is kept."""
    if machine._tracking is None:
        machine._tracking = Tracking(machine.vm, machine.memory)
    known = machine._plan
    if known is not None and known[0] is snapshot:
        return known[1]
    plan = _plan(machine, snapshot, machine._tracking)
    machine._plan = snapshot, plan
    return plan


def _plan(machine: Machine, snapshot: Snapshot, tracking: Tracking | None) -> Plan:
    if machine.options["irqchip"] != snapshot.options["irqchip"]:
        raise SnapshotError("the snapshot's interrupt controller is another than the machine's")
    cpus = [(runner.vcpu, runner.c) for runner in machine._runners]
    irqchip = machine.irqchip is not None
    return Plan(machine.vm, cpus, tracking, snapshot.vcpus, snapshot.vm, snapshot.image, irqchip)


def _check(machine: Machine) -> None:
    if machine.closed:
        raise ClosedError("this machine is closed")
    if machine.running:
        raise BusyError("a vCPU of this machine is running: stop() it first")


@contextmanager
def _quiet(machine: Machine) -> Iterator[None]:
    """Hold the machine's I/O threads still, after they did what was asked of them."""
    with ExitStack() as held:
        if machine._virtio is not None:
            for thread in machine._virtio.threads:
                thread.settle()
                held.enter_context(thread.quiesce())
        yield


__all__ = ["Snapshot", "plan_of", "take"]
