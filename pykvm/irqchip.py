"""The interrupt controllers of a machine: all in the kernel, or the IOAPIC in this process.

Either way the local APICs are the kernel's, so interrupts reach a guest without an exit, and HLT
waits in the kernel.
"""

from __future__ import annotations

from pykvm import kvm
from pykvm.arch.x86_64 import pc
from pykvm.arch.x86_64.pic import bios_state

TYPE_CHECKING = False
if TYPE_CHECKING:
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


class KernelIrqchip:
    """A pair of 8259A PICs, an IOAPIC and the local APICs, all in the kernel.

    Attributes:
        kind: ``"kernel"``.
        has_pic: True.
    """

    kind = KERNEL
    has_pic = True

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        vm.create_irqchip()

    def line(self, gsi: int, level: int) -> None:
        """Raise (1) or lower (0) an interrupt line."""
        self._vm.irq_line(gsi, level)

    def connect(self, fd: int, gsi: int) -> None:
        """Have an eventfd raise a line, as an edge, without this process."""
        self._vm.irqfd(fd, gsi)

    def wire_as_pc(self) -> None:
        """Lead the timer's line to the IOAPIC input that a PC has it at, see ``pc.GSI_ROUTES``."""
        chips = {
            "pic-master": kvm.KVM_IRQCHIP_PIC_MASTER,
            "pic-slave": kvm.KVM_IRQCHIP_PIC_SLAVE,
            "ioapic": kvm.KVM_IRQCHIP_IOAPIC,
        }
        self._vm.set_gsi_routing(
            [kvm.irqchip_route(gsi, chips[chip], pin) for gsi, chip, pin in pc.GSI_ROUTES]
        )

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

    KVM's table of GSI routes is the IOAPIC's: it has GSIs 0-23.

    Attributes:
        kind: ``"split"``.
        has_pic: False.
        ioapic: the :class:`~pykvm.devices.ioapic.Ioapic`.
    """

    kind = SPLIT
    has_pic = False

    def __init__(self, vm: Vm, machine: Hooks) -> None:
        from pykvm.devices.ioapic import PINS, Ioapic

        self._vm = vm
        vm.need("KVM_CAP_SPLIT_IRQCHIP")
        vm.enable_cap("KVM_CAP_SPLIT_IRQCHIP", PINS)
        self.ioapic = Ioapic(self._route, self._send)
        self.ioapic.attach(machine.mmio, pc.IOAPIC)
        machine.on_exit(
            kvm.KVM_EXIT_IOAPIC_EOI, lambda exit: self.ioapic.end_of_interrupt(exit.vector)
        )

    def _route(self, routes: Routes) -> None:
        self._vm.set_gsi_routing([kvm.msi_route(*route) for route in routes])

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
