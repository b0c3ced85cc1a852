"""The interrupt controllers of a machine: all in the kernel, or the IOAPIC in this process.

Either way the local APICs are the kernel's, so interrupts reach a guest without an exit, and HLT
waits in the kernel.
"""

from __future__ import annotations

import os
from _thread import allocate_lock

from pykvm import kvm
from pykvm.arch.x86_64 import pc
from pykvm.arch.x86_64.pic import bios_state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.devices.ioapic import Routes
    from pykvm.hooks import Hooks
    from pykvm.kvm import Vm

KERNEL, SPLIT = "kernel", "split"


def kind_of(wanted: str | bool | None) -> str | None:
    """What ``Machine(irqchip=…)`` means: "kernel" (or True), "split", or None (or False).

    Raises:
        ValueError: something else.
    """
    if wanted is None or wanted is False:
        return None
    kind = KERNEL if wanted is True else wanted
    if kind not in (KERNEL, SPLIT):
        raise ValueError(f'irqchip is "{KERNEL}", "{SPLIT}" or None, not {wanted!r}')
    return kind


class GsiTable:
    """KVM's table of GSI routes, which can only be replaced whole: the chip's own, and messages.

    Attributes:
        messages: address and data by GSI.
    """

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._chip: list[Any] = []
        self._next = pc.FIRST_MSI_GSI
        self._lock = allocate_lock()  # vCPUs program their devices at the same time
        self.messages: dict[int, tuple[int, int]] = {}

    def set_chip(self, routes: list[Any], *, commit: bool = True) -> None:
        """Replace the routes of the interrupt controller's own lines."""
        with self._lock:
            self._chip = routes
            if commit:
                self._commit()

    def set_messages(self, messages: dict[int, tuple[int, int] | None]) -> None:
        """Set what some GSIs send, None: nothing; all at once."""
        with self._lock:
            for gsi, message in messages.items():
                if message is None:
                    self.messages.pop(gsi, None)
                else:
                    # The byte is reserved, and KVM refuses it where it knows the format.
                    self.messages[gsi] = message[0] & ~(0xFF << 32), message[1]
            self._commit()

    def _commit(self) -> None:
        messages = [kvm.msi_route(gsi, *message) for gsi, message in self.messages.items()]
        self._vm.set_gsi_routing([*self._chip, *messages])

    def allocate(self, count: int) -> int:
        """The first of so many GSIs that no line has."""
        first, self._next = self._next, self._next + count
        return first


class MsiLines:
    """Message-signalled interrupts of one device: eventfds that have KVM send the messages.

    Args:
        vm: the VM.
        table: its routes.
        count: how many.
    """

    def __init__(self, vm: Vm, table: GsiTable, count: int) -> None:
        self._vm = vm
        self._table = table
        self._first = table.allocate(count)
        self._fds = [-1] * count

    def route(self, messages: dict[int, tuple[int, int] | None]) -> None:
        """From now on these lines send these messages, or None at all."""
        for index in messages:
            if self._fds[index] < 0:
                fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                try:
                    self._vm.irqfd(fd, self._first + index)
                except BaseException:
                    os.close(fd)
                    raise
                self._fds[index] = fd
        self._table.set_messages({self._first + i: each for i, each in messages.items()})

    def fire(self, index: int) -> None:
        """Send a message; from any thread, without an exit."""
        fd = self._fds[index]
        if fd >= 0:
            os.eventfd_write(fd, 1)

    def eventfd(self, index: int) -> int:
        """What :meth:`fire` writes, or -1: nothing is routed yet."""
        return self._fds[index]

    def close(self) -> None:
        """Close the eventfds, by which KVM lets go of them. Idempotent."""
        for index, fd in enumerate(self._fds):
            if fd >= 0:
                os.close(fd)
                self._fds[index] = -1


def _chip_routes(timer_pin: int) -> list[Any]:
    """The routes of KVM's own interrupt controllers."""
    chips = {
        "pic-master": kvm.KVM_IRQCHIP_PIC_MASTER,
        "pic-slave": kvm.KVM_IRQCHIP_PIC_SLAVE,
        "ioapic": kvm.KVM_IRQCHIP_IOAPIC,
    }
    return [kvm.irqchip_route(gsi, chips[chip], pin) for gsi, chip, pin in pc.gsi_routes(timer_pin)]


class KernelIrqchip:
    """A pair of 8259A PICs, an IOAPIC and the local APICs, all in the kernel.

    Attributes:
        kind: ``"kernel"``.
        has_pic: True.
        table: the GSI routes; made when it is first asked for.
    """

    kind = KERNEL
    has_pic = True

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._table: GsiTable | None = None
        vm.create_irqchip()

    @property
    def table(self) -> GsiTable:  # noqa: D102
        if self._table is None:
            self._table = GsiTable(self._vm)
            self._table.set_chip(_chip_routes(0), commit=False)  # as KVM_CREATE_IRQCHIP has them
        return self._table

    def messages(self, count: int) -> MsiLines:
        """Make lines for so many message-signalled interrupts."""
        return MsiLines(self._vm, self.table, count)

    def line(self, gsi: int, level: int) -> None:
        """Raise (1) or lower (0) an interrupt line."""
        self._vm.irq_line(gsi, level)

    def connect(self, fd: int, gsi: int) -> None:
        """Have an eventfd raise a line, as an edge, without this process."""
        self._vm.irqfd(fd, gsi)

    def wire_as_pc(self) -> None:
        """Lead the timer's line to the IOAPIC input that a PC has it at, see ``pc.GSI_ROUTES``."""
        self.table.set_chip(_chip_routes(pc.TIMER_PIN))

    def program_pic_as_bios(self) -> None:
        """Program the PICs as a BIOS leaves them: IRQ 0-7 at vector 8, 8-15 at 0x70.

        Timer and keyboard are open, the rest is masked (``arch.x86_64.pic``).
        """
        for name, chip_id in (
            ("master", kvm.KVM_IRQCHIP_PIC_MASTER),
            ("slave", kvm.KVM_IRQCHIP_PIC_SLAVE),
        ):
            chip = self._vm.get_irqchip(chip_id)
            for member, value in bios_state(name).items():
                setattr(chip.chip.pic, member, value)
            self._vm.set_irqchip(chip)


class SplitIrqchip:
    """Local APICs in the kernel, an IOAPIC at 0xfec00000 in this process, no PIC and no PIT.

    In KVM's table of GSI routes the IOAPIC has GSIs 0-23.

    Attributes:
        kind: ``"split"``.
        has_pic: False.
        ioapic: the :class:`~pykvm.devices.ioapic.Ioapic`.
        table: the GSI routes.
    """

    kind = SPLIT
    has_pic = False

    def __init__(self, vm: Vm, machine: Hooks) -> None:
        from pykvm.devices.ioapic import PINS, Ioapic

        self._vm = vm
        self.table = GsiTable(vm)
        vm.need("KVM_CAP_SPLIT_IRQCHIP")
        vm.enable_cap("KVM_CAP_SPLIT_IRQCHIP", PINS)
        self.ioapic = Ioapic(self._route, self._send)
        self.ioapic.attach(machine.mmio, pc.IOAPIC)
        machine.on_exit(
            kvm.KVM_EXIT_IOAPIC_EOI, lambda exit: self.ioapic.end_of_interrupt(exit.vector)
        )

    def _route(self, routes: Routes) -> None:
        self.table.set_chip([kvm.msi_route(*route) for route in routes])

    def messages(self, count: int) -> MsiLines:
        """Make lines for so many message-signalled interrupts."""
        return MsiLines(self._vm, self.table, count)

    def _send(self, gsi: int) -> int:
        # Not KVM_SIGNAL_MSI: that fails where a guest names a processor that there is not.
        return self._vm.irq_line_status(gsi, 1)

    def line(self, gsi: int, level: int) -> None:
        """Raise (1) or lower (0) an input of the IOAPIC."""
        self.ioapic.line(gsi, level)

    def connect(self, fd: int, gsi: int) -> None:
        """Have an eventfd raise a line, as an edge, without this process.

        The guest must not make it level-triggered: nothing would be sent again.
        """
        self._vm.irqfd(fd, gsi)

    def wire_as_pc(self) -> None:
        """Nothing to do: every GSI is the IOAPIC's input of the same number."""
