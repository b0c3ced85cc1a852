"""VM ioctls about interrupts: the in-kernel PIC, IOAPIC and PIT, GSI routes, irqfd, ioeventfd."""

from __future__ import annotations

from pykvm._abi import ffi, lib

from .flex import get, pointer
from .handle import CapHandle
from .ioctl import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any


def irqchip_route(gsi: int, irqchip: int, pin: int) -> Any:
    """A GSI that drives a pin of a chip, for :meth:`Vm.set_gsi_routing`.

    Args:
        gsi: the line's number, below KVM_CAP_IRQ_ROUTING.
        irqchip: KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE or KVM_IRQCHIP_IOAPIC.
        pin: the chip's input, 0-7 of a PIC, 0-23 of the IOAPIC.
    """
    entry = ffi.new("struct kvm_irq_routing_entry *")
    entry.gsi = gsi
    entry.type = lib.KVM_IRQ_ROUTING_IRQCHIP
    entry.u.irqchip.irqchip = irqchip
    entry.u.irqchip.pin = pin
    return entry[0]


def msi_route(gsi: int, address: int, data: int) -> Any:
    """A GSI that sends a message-signalled interrupt, for :meth:`Vm.set_gsi_routing`.

    Args:
        gsi: the line's number, below KVM_CAP_IRQ_ROUTING.
        address: 64 bits, as the device's MSI address register (0xfee00000 and up).
        data: 32 bits, as its data register.
    """
    entry = ffi.new("struct kvm_irq_routing_entry *")
    entry.gsi = gsi
    entry.type = lib.KVM_IRQ_ROUTING_MSI
    entry.u.msi.address_lo = address & 0xFFFFFFFF
    entry.u.msi.address_hi = address >> 32
    entry.u.msi.data = data
    return entry[0]


class IrqMixin(CapHandle):
    """What :class:`Vm` does with interrupts."""

    __slots__ = ()

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP (api.rst 4.24): an in-kernel PIC pair, IOAPIC, and LAPICs.

        Before the first vCPU. GSIs 0-15 then drive the PIC and the IOAPIC, 16-23 the IOAPIC
        alone; HLT waits in the kernel and does not exit any more. Needs KVM_CAP_IRQCHIP.

        Errors: EEXIST if there is one; EINVAL if a vCPU exists, or the VM's type forbids it.
        """
        self.need("KVM_CAP_IRQCHIP")
        call(self, "KVM_CREATE_IRQCHIP")

    def get_irqchip(self, chip_id: int) -> Any:
        """KVM_GET_IRQCHIP (api.rst 4.26): the state of one chip.

        Args:
            chip_id: KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE or KVM_IRQCHIP_IOAPIC.

        Returns: ``struct kvm_irqchip *``: ``chip.pic`` or ``chip.ioapic``.

        Errors: ENXIO without :meth:`create_irqchip`; EINVAL for another chip_id.
        """
        self.need("KVM_CAP_IRQCHIP")
        chip = ffi.new("struct kvm_irqchip *", {"chip_id": chip_id})
        call(self, "KVM_GET_IRQCHIP", chip)
        return chip

    def set_irqchip(self, chip: Any) -> None:
        """KVM_SET_IRQCHIP (api.rst 4.27): put one chip into a state.

        Args:
            chip: ``struct kvm_irqchip``, its ``chip_id`` says which.
        """
        self.need("KVM_CAP_IRQCHIP")
        call(self, "KVM_SET_IRQCHIP", pointer(chip, "struct kvm_irqchip *"))

    def create_pit2(self, flags: int = 0) -> None:
        """KVM_CREATE_PIT2 (api.rst 4.71): an in-kernel i8254 timer, on GSI 0.

        Args:
            flags: KVM_PIT_SPEAKER_DUMMY, to have the speaker's port 0x61 as well.

        Needs KVM_CAP_PIT2, and :meth:`create_irqchip` before it.

        Errors: EEXIST if there is one; ENOENT without an irqchip.
        """
        self.need("KVM_CAP_PIT2")
        call(self, "KVM_CREATE_PIT2", ffi.new("struct kvm_pit_config *", {"flags": flags}))

    def get_pit2(self) -> Any:
        """KVM_GET_PIT2 (api.rst 4.72): the timer's ``struct kvm_pit_state2 *``.

        Needs KVM_CAP_PIT_STATE2. Errors: ENXIO without :meth:`create_pit2`.
        """
        self.need("KVM_CAP_PIT_STATE2")
        return get(self, "KVM_GET_PIT2", "struct kvm_pit_state2 *")

    def set_pit2(self, state: Any) -> None:
        """KVM_SET_PIT2 (api.rst 4.73): put the timer into a state.

        Args:
            state: ``struct kvm_pit_state2``.

        Needs KVM_CAP_PIT_STATE2. Errors: ENXIO without :meth:`create_pit2`.
        """
        self.need("KVM_CAP_PIT_STATE2")
        call(self, "KVM_SET_PIT2", pointer(state, "struct kvm_pit_state2 *"))

    def reinject_control(self, pit_reinject: bool) -> None:
        """KVM_REINJECT_CONTROL (api.rst 4.99): whether missed PIT ticks are made up for.

        Needs KVM_CAP_REINJECT_CONTROL. Errors: ENXIO without :meth:`create_pit2`.
        """
        self.need("KVM_CAP_REINJECT_CONTROL")
        control = ffi.new("struct kvm_reinject_control *", {"pit_reinject": int(pit_reinject)})
        call(self, "KVM_REINJECT_CONTROL", control)

    def set_gsi_routing(self, entries: Iterable[Any], flags: int = 0) -> None:
        """KVM_SET_GSI_ROUTING (api.rst 4.52): replace the whole table of GSI routes.

        Args:
            entries: ``struct kvm_irq_routing_entry``, as :func:`irqchip_route` and
                :func:`msi_route` make them. One GSI may have an entry for each chip.
            flags: none are defined.

        Needs KVM_CAP_IRQ_ROUTING. There is no ioctl to read the table back.

        Errors: EINVAL for a GSI out of range, a pin of no chip, or without an irqchip (routes to
        chips need one; routes to MSIs need a local APIC).
        """
        self.need("KVM_CAP_IRQ_ROUTING")
        items = list(entries)
        table = ffi.new(
            "struct kvm_irq_routing *",
            {"nr": len(items), "flags": flags, "entries": len(items)},
        )
        for index, entry in enumerate(items):
            table.entries[index] = pointer(entry, "struct kvm_irq_routing_entry *")[0]
        call(self, "KVM_SET_GSI_ROUTING", table)

    def irq_line(self, irq: int, level: int) -> None:
        """KVM_IRQ_LINE (api.rst 4.25): raise or lower a GSI.

        Args:
            irq: the GSI.
            level: 1 is active, 0 inactive; an edge is 1, then 0.

        Needs KVM_CAP_IRQCHIP. Errors: ENXIO without :meth:`create_irqchip`.
        """
        self.need("KVM_CAP_IRQCHIP")
        call(self, "KVM_IRQ_LINE", ffi.new("struct kvm_irq_level *", {"irq": irq, "level": level}))

    def irq_line_status(self, irq: int, level: int) -> int:
        """KVM_IRQ_LINE_STATUS: as :meth:`irq_line`, and what became of it.

        Returns: 0 if it merged with one still pending; -1 if it was masked or ignored; else how
        many processors it was delivered to. Needs KVM_CAP_IRQ_INJECT_STATUS.
        """
        self.need("KVM_CAP_IRQ_INJECT_STATUS")
        line = ffi.new("struct kvm_irq_level *", {"irq": irq, "level": level})
        call(self, "KVM_IRQ_LINE_STATUS", line)
        return int(line.status)

    def irqfd(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = 0) -> None:
        """KVM_IRQFD (api.rst 4.75): an eventfd that raises a GSI without this process.

        Args:
            fd: the eventfd.
            gsi: the line, routed by :meth:`set_gsi_routing` or as :meth:`create_irqchip` did.
            flags: KVM_IRQFD_FLAG_DEASSIGN removes it (same fd and gsi);
                KVM_IRQFD_FLAG_RESAMPLE for level-triggered lines (KVM_CAP_IRQFD_RESAMPLE).
            resamplefd: eventfd signalled when the guest ends such an interrupt (EOI).

        Needs KVM_CAP_IRQFD.

        Errors: EBUSY if the eventfd raises a GSI already; EAGAIN without an irqchip.
        """
        self.need("KVM_CAP_IRQFD")
        if flags & lib.KVM_IRQFD_FLAG_RESAMPLE:
            self.need("KVM_CAP_IRQFD_RESAMPLE")
        args = ffi.new("struct kvm_irqfd *")
        args.fd = fd
        args.gsi = gsi
        args.flags = flags
        args.resamplefd = resamplefd
        call(self, "KVM_IRQFD", args)

    def ioeventfd(
        self, addr: int, len: int, fd: int, datamatch: int | None = None, flags: int = 0
    ) -> None:
        """KVM_IOEVENTFD (api.rst 4.59): a guest's write signals an eventfd instead of exiting.

        Args:
            addr: the guest-physical address, or with KVM_IOEVENTFD_FLAG_PIO the port.
            len: bytes of the write, 1, 2, 4 or 8; 0 for any (KVM_CAP_IOEVENTFD_ANY_LENGTH).
            fd: the eventfd.
            datamatch: only writes of this value; others exit.
            flags: KVM_IOEVENTFD_FLAG_PIO; KVM_IOEVENTFD_FLAG_DEASSIGN removes it (all
                arguments as they were given).

        Needs KVM_CAP_IOEVENTFD.

        Errors: EEXIST if the same address, length and datamatch are taken; ENOENT on removing
        what is not there; ENOSPC when the bus is full; EINVAL for another len.
        """
        self.need("KVM_CAP_IOEVENTFD")
        if len == 0:
            self.need("KVM_CAP_IOEVENTFD_ANY_LENGTH")
        args = ffi.new("struct kvm_ioeventfd *")
        if datamatch is not None:
            flags |= lib.KVM_IOEVENTFD_FLAG_DATAMATCH
            args.datamatch = datamatch
        args.addr = addr
        args.len = len
        args.fd = fd
        args.flags = flags
        call(self, "KVM_IOEVENTFD", args)

    def signal_msi(
        self, address_lo: int, data: int, address_hi: int = 0, flags: int = 0, devid: int = 0
    ) -> int:
        """KVM_SIGNAL_MSI (api.rst 4.71): deliver one message-signalled interrupt.

        Args:
            address_lo: low half of the message's address (0xfee00000 and up).
            data: the message: bits 7:0 the vector, 10:8 the delivery mode.
            address_hi: high half; counts only with KVM_X2APIC_API_USE_32BIT_IDS.
            flags: KVM_MSI_VALID_DEVID (KVM_CAP_MSI_DEVID; not on x86).
            devid: with it.

        Returns: how many processors took it; 0 if the guest blocked it. Needs
        KVM_CAP_SIGNAL_MSI.

        Errors: EINVAL without an in-kernel local APIC.
        """
        self.need("KVM_CAP_SIGNAL_MSI")
        msi = ffi.new("struct kvm_msi *")
        msi.address_lo = address_lo
        msi.address_hi = address_hi
        msi.data = data
        msi.flags = flags
        msi.devid = devid
        return call(self, "KVM_SIGNAL_MSI", msi)
