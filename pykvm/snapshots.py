"""``Snapshot``: a machine at one moment; to go back to, to fork, to compare, to keep in a file.

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

from pykvm import snapshot_cpuid as cpuid_of
from pykvm.errors import SnapshotError
from pykvm.kvm.handle import Closing
from pykvm.machine import MAX_CPUS, Machine
from pykvm.memory import GuestMemory
from pykvm.snapshot import claims as claims_of
from pykvm.snapshot import devices as devices_of
from pykvm.snapshot import identity as identities
from pykvm.snapshot import served as served_by
from pykvm.snapshot import unseen as unseen_by
from pykvm.snapshot_at_rest import check_idle, hooks_of, make_plan, plan_of, quiet, tell_identity

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.devices.vmgenid import Identity
    from pykvm.snapshot.diff import Diff
    from pykvm.snapshot.image import Image
    from pykvm.snapshot.vcpu import VcpuState

    Setup = Callable[[Machine], object]


class Snapshot(Closing):
    """A machine at one moment. ``Machine.snapshot()`` takes it, :meth:`load` reads it.

    It is a value: it never changes, and outlives its machine. Its memory goes with the last
    reference to it, or with :meth:`close`.

    Attributes:
        options: what the machine was made with, see ``Machine.options``; of one from a file the
            CPUID leaves are as in :attr:`cpuid`.
        vcpus: the state of each vCPU.
        vm: the state of the VM, KVM's structures by name.
        devices: the state of every device, by its first port or address.
        claims: the ranges that C serves and that a machine can be given again.
        served: ranges, MSRs and exits that code served, which it cannot.
        cpus: of each vCPU, whether it was entered and why it cannot go on.
        halted: indices of those that have halted, and wait for the others to.
        is_pc: whether it was booted, and so has the devices of a PC.
        unseen: by index, what a vCPU wrote that no run has told of; the next one does.
        image: its memory.
        identity: where in it the guest's VM generation ID is, or None.
        id: 32 hexadecimal digits that no other snapshot has.
        path: the file that it is in, or "".
        loaded: whether it was read from there.
        cpuid: the CPUID leaves that the machine was made from, each as hexadecimal bytes.
        tsc_khz: the guest's TSC frequency, or 0 where KVM does not tell.
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
        self.halted: list[int] = []
        self.unseen: dict[int, dict[str, Any]] = {}
        self.image = image
        self.is_pc = is_pc
        self.id = id or os.urandom(16).hex()
        self.path = ""
        self.loaded = False
        self.cpuid: list[str] | None = None
        self.tsc_khz = 0
        self.boot_plan: Any = None
        self.identity: int | None = None
        self.served: list[dict[str, Any]] = []
        self._machine: Machine | None = None

    # ---- back ----------------------------------------------------------------------------------

    def restore(self, machine: Machine | None = None, *, identity: Identity = "keep") -> None:
        """Put a machine back to this moment, in place.

        Args:
            machine: the one that the snapshot is of, by default; or one that is just like it.
            identity: as of :meth:`fork`. By default all is as it was, which what is tried again and
                again needs to be the same.

        The first time every page is compared; from then on KVM logs what the guest writes, and only
        that is copied (and what the host wrote through ``m.mem``, and pages under a view of it).

        Raises:
            BusyError: the machine runs.
            SnapshotError: the machine is another, or has no identity to be given.
        """
        machine = machine or self._machine
        if machine is None:
            raise SnapshotError("this snapshot has no machine: fork() it, or say which to restore")
        value = identities.another(
            identity, machine.pc is not None and machine.pc.identity is not None
        )
        machine.forget_stop()
        self.put_back(machine)
        tell_identity(machine, value)

    def put_back(self, machine: Machine, resume: bool = True, planted: bool = False) -> None:
        """:meth:`restore`, but for a ``stop()``, which stays for the next run.

        Args:
            machine: which.
            resume: have devices look for what was asked for and not done.
            planted: the plan sees to stops in the guest's code.
        """
        check_idle(machine)
        if any(runner.log is not None for runner in machine._runners):
            raise SnapshotError("the machine is being recorded or replayed: restore it before")
        with quiet(machine):
            plan = plan_of(machine, self)
            if not plan.run():
                for runner in machine._runners:
                    runner.complete()
                if not plan.run():
                    raise SnapshotError("a vCPU does not come to the end of its instruction")
            self.finish(machine, devices_of.find((machine.pio, machine.mmio)), resume)
            if machine._debugger is not None:
                machine._debugger.restored(planted)

    def finish(self, machine: Machine, devices: dict[str, Any], resume: bool = True) -> None:
        """After KVM's part: devices, and what Python remembers."""
        for cpu, (entered, ended) in zip(machine.cpus, self.cpus, strict=True):
            cpu.put_back(entered, ended)
        for index in self.halted:
            machine.cpus[index].flush()  # registers that are new would be another life
            machine._runners[index].halt()
        for index, item in self.unseen.items():
            unseen_by.hand_out(machine._runners[index].c, item)
        devices_of.restore(devices, self.devices, self.served)
        if resume:
            devices_of.resume(devices)

    def fork(self, setup: Setup | None = None, *, identity: Identity = "new") -> Machine:
        """Make another machine of it, which shares every page of memory until it writes it.

        What C serves (``m.pio.fifo()`` and its like) and the devices of a PC are made anew.
        Handlers in Python, other devices and disks are code, or belong to the other machine:
        ``setup`` gives the new one its own, before their state is restored.

        Args:
            setup: called with the machine before anything is restored. Handlers that the original
                had, and that are not there afterwards, are named by a RuntimeWarning.
            identity: the VM generation ID of a guest that was booted with one: ``"new"``: another,
                random one, of which it is told as it runs on, so that its random numbers are its
                own; ``"keep"``: that of the snapshot, for what is to repeat exactly; or 16 bytes or
                a UUID.

        Raises:
            SnapshotError: the snapshot has the state of a device that the machine lacks, or no
                place for an identity that was given.
        """
        value = identities.another(identity, self.identity is not None)
        memory = GuestMemory()
        try:
            self.image.map_into(memory)
            options = self.options
            if self.loaded:
                options = {**options, "cpuid": cpuid_of.entries(self.cpuid)}
            machine = Machine(memory, **options)
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
            if self.identity is not None and machine.pc is not None:
                machine.pc.put_identity(self.identity)
            claims_of.give(self.claims, (machine.pio, machine.mmio))
            if self.loaded:
                cpuid_of.same_tsc(machine, self.tsc_khz)
            plan = make_plan(machine, self, None)
            if not plan.run():
                raise SnapshotError("a vCPU that never ran has an access open")
            with quiet(machine):
                self.finish(machine, devices_of.find((machine.pio, machine.mmio)))
            tell_identity(machine, value)
            served_by.warn(self.served, (machine.pio, machine.mmio), hooks_of(machine))
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

    # ---- keeping -------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], base: Any = None) -> None:
        """Write it to a file; see :mod:`pykvm.snapshot.file`.

        Args:
            path: the file, which is made anew.
            base: another snapshot that was saved or loaded, or its path: the file then has only
                what is different, and needs that one to be loaded.
        """
        from pykvm.snapshot import file

        below = None
        if base is not None:
            base = base if isinstance(base, Snapshot) else Snapshot.load(base)
            if not base.path:
                raise SnapshotError("the base is in no file: save() it first")
            below = base.path, base.id, base.image
        file.save(self._header(), self.image, os.fspath(path), below)
        self.path = os.path.abspath(os.fspath(path))

    def _header(self) -> dict[str, Any]:
        from pykvm.snapshot import file

        return {
            "id": self.id,
            "options": {**self.options, "cpuid": self.cpuid},
            "tsc_khz": self.tsc_khz,
            "cpus": self.cpus,
            "halted": self.halted,
            "unseen": self.unseen,
            "is_pc": self.is_pc,
            "identity": self.identity,
            "vcpus": [file.vcpu_to_json(state) for state in self.vcpus],
            "vm": {name: data.hex() for name, data in self.vm.items()},
            "devices": self.devices,
            "claims": self.claims,
            "served": self.served,
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Snapshot:
        """Read a file that :meth:`save` wrote. :meth:`fork` makes a machine of it.

        All but that needs no KVM: what was the matter with a guest can be seen anywhere.

        Args:
            path: the file.
            verify: read all pages there are and compare their checksums. Else pages are read as the
                guest touches them, whatever is in the file then.

        Raises:
            SnapshotError: damaged, newer, or not a snapshot: the reason.
        """
        from pykvm.snapshot import file

        name = os.fspath(path)
        header, image = file.load(name, verify)
        try:
            options = dict(header["options"])
            cpuid = options["cpuid"]
            cpuid_of.check(cpuid)
            options["path"] = "/dev/kvm"
            _check_options(options)
            made = cls(
                options,
                [file.vcpu_of_json(each) for each in header["vcpus"]],
                file.vm_of_json(header["vm"]),
                dict(header["devices"]),
                [dict(each) for each in header["claims"]],
                [(bool(entered), str(ended)) for entered, ended in header["cpus"]],
                image,
                is_pc=bool(header["is_pc"]),
                id=str(header["id"]),
            )
            halted = header.get("halted", ())
            made.halted = [index for index in range(len(made.cpus)) if index in halted]
            made.cpuid, made.tsc_khz = cpuid, int(header["tsc_khz"])
            # Older files have none of these.
            made.unseen = unseen_by.of_json(header.get("unseen", {}), len(made.cpus))
            made.served = served_by.of_json(header.get("served", ()))
            place = header.get("identity")
            made.identity = None if place is None else identities.place(place, image)
            if len(made.cpus) != len(made.vcpus) or len(made.cpus) != options["cpus"]:
                raise ValueError("it is of different numbers of vCPUs")
        except file.SENSELESS as error:
            image.close()
            raise SnapshotError(f"{name}: the header does not make sense: {error!r}") from error
        made.path = os.path.abspath(name)
        made.loaded = True
        return made

    def dump(self, path: str | os.PathLike[str]) -> None:
        """Write memory and registers as an ELF core file, see ``Machine.dump``."""
        from pykvm.snapshot.vmcore import dump

        dump(self.image, self.vcpus, os.fspath(path))

    # ---- life ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of its memory. Idempotent; machines forked from it go on."""
        machine, self._machine = self._machine, None
        if machine is not None and machine._plan is not None and machine._plan[0] is self:
            machine._plan = None
        self.image.close()

    def __repr__(self) -> str:
        from pykvm.memory import format_size

        size = sum(part.size for part in self.image.parts)
        return (
            f"<Snapshot {self.id[:8]} of {len(self.vcpus)} cpus, {format_size(size)}, of which"
            f" {format_size(self.image.held)} are not zeros>"
        )


_OPTIONS: dict[str, tuple[object, ...]] = {
    "cpus": (int,), "irqchip": (None, "kernel", "split"), "pit": (bool,), "pic": ("reset", "bios"),
    "features": (str,), "cpuid": (None, list), "path": (str,),
}  # fmt: skip


def _check_options(options: dict[str, Any]) -> None:
    """ValueError unless a machine could be made with them; their numbers are seen to there."""
    if options.keys() != _OPTIONS.keys():
        raise ValueError(f"no machine has the options {sorted(options.keys() ^ _OPTIONS.keys())}")
    for name, value in options.items():
        if value not in _OPTIONS[name] and type(value) not in _OPTIONS[name]:
            raise ValueError(f"{name}={value!r} is no option of a machine")
    if not 1 <= options["cpus"] <= MAX_CPUS:
        raise ValueError(f"no machine has {options['cpus']} vCPUs")
