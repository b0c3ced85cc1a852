"""Whether a machine is what a snapshot of it says: all of memory, every register.

Unlike ``s.diff(m.snapshot())`` it costs some hundred microseconds, so that it can be asked after
each of ten thousand resets; and it reads memory itself, not by the code that takes images.
"""

from __future__ import annotations

import pykvm
from pykvm._abi import ffi
from pykvm.snapshot import vcpu as vcpus

PAGE = 4096


class Judge:
    """Compares a machine with a snapshot, again and again."""

    def __init__(self, machine: pykvm.Machine, snapshot: pykvm.Snapshot) -> None:
        self._machine = machine
        self._snapshot = snapshot
        self._regions = [
            (
                region.guest_phys_addr,
                # Not a view: pages under one are compared at every reset, tracked or not.
                ffi.buffer(ffi.cast("char *", region.userspace_addr), region.memory_size),
                snapshot.read(region.guest_phys_addr, region.memory_size),
            )
            for region in machine.memory.regions
        ]

    def pages(self) -> list[int]:
        """Addresses of the pages that differ."""
        return [
            gpa + at
            for gpa, now, then in self._regions
            if now != then
            for at in range(0, len(then), PAGE)
            if now[at : at + PAGE] != then[at : at + PAGE]
        ]

    def registers(self) -> list[str]:
        """Every register of every vCPU that KVM tells and that differs, but for the TSC."""
        machine, changes = self._machine, []
        for runner, cpu, then in zip(
            machine._runners, machine.cpus, self._snapshot.vcpus, strict=True
        ):
            runner.complete()
            cpu.flush()  # what stands in the run page for the next entry
            now = vcpus.capture(runner.vcpu, machine.irqchip is not None)
            changes += [
                f"cpu {cpu.index} {name}: {old:#x} -> {new:#x}"
                for name, old, new in vcpus.differences(then, now)
            ]
        return changes

    def differences(self) -> list[str]:
        """What differs, in words; empty if nothing does."""
        return [f"page {gpa:#x}" for gpa in self.pages()] + self.registers()
