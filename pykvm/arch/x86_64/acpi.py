"""The ACPI tables by which a kernel finds processors, interrupts, devices, power off and reset.

The hardware model is the full one, as on PCs ("not hardware-reduced", ACPI 6.5, 4.8): the registers
are those of ``pykvm.devices.pm`` and ``pykvm.devices.reset``.
"""

from __future__ import annotations

from pykvm.arch.x86_64 import aml, pc
from pykvm.arch.x86_64.acpi_format import Table, io_register
from pykvm.arch.x86_64.acpi_tables import (
    Dsdt,
    Facs,
    Fadt,
    GenerationId,
    Madt,
    Rsdp,
    Rsdt,
    Xsdt,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

NO_C2, NO_C3 = 101, 1001
"""Latencies, in µs, that mean that there is no such state (5.2.9)."""
MIN_X2APIC = 255
"""From this APIC id on a processor has an x2APIC entry (5.2.12.12)."""
EVERY_CPU = 0xFF
"""As the UID of an NMI entry."""


class Acpi:
    """All tables, placed.

    Attributes:
        base: guest-physical address of the first byte. A memory map given to the kernel has
            ``base..base + len(blob)`` as reserved.
        blob: the bytes. They need to be writable: the FACS has a lock.
        rsdp: guest-physical address of the root pointer.
        generation_id: guest-physical address of the VM generation ID, or None.
        tables: ``(address, table)``, in the order of addresses; print them.
    """

    def __init__(self, base: int, placed: Sequence[tuple[int, Any]]) -> None:
        self.base = base
        self.tables = tuple(placed)
        self.rsdp = next(address for address, table in placed if isinstance(table, Rsdp))
        self.generation_id: int | None = next(
            (address for address, table in placed if isinstance(table, GenerationId)), None
        )
        blob = bytearray()
        for address, table in placed:
            blob += bytes(address - base - len(blob)) + table.encode()
        self.blob = bytes(blob)

    def write(self, memory: Any) -> None:
        """Put the tables into guest memory."""
        memory[self.base : self.base + len(self.blob)] = self.blob

    def __repr__(self) -> str:
        return "\n".join(f"{address:#x} {table!r}" for address, table in self.tables)


def build_acpi(
    *,
    cpus: int | Sequence[int],
    base: int = pc.ACPI_BASE,
    com1: bool = True,
    virtio: Sequence[tuple[int, int, int]] = (),
    edge: bool = True,
    pvpanic: int | None = pc.PVPANIC,
    rtc: bool = False,
    ioapic: int = pc.IOAPIC,
    timer_pin: int = pc.TIMER_PIN,
    pm_base: int = pc.PM_BASE,
    reset: int = pc.RESET,
    pic: bool = True,
    pci: bool = False,
    generation_id: bytes | None = None,
) -> Acpi:
    """Make the tables of a PC.

    Args:
        cpus: how many processors, with APIC ids from 0 on; or their APIC ids.
        base: guest-physical address, on a 64-byte boundary, below 4 GiB. A kernel that is not
            handed :attr:`Acpi.rsdp` only looks for it from 0xe0000 to 0xfffff.
        com1: whether there is a 16550A at port 0x3f8.
        virtio: ``(base, size, gsi)`` of each virtio-mmio window; a stock kernel finds them as
            LNRO0005 devices.
        edge: whether those interrupts are edge-triggered, as irqfds without resampling are.
        pvpanic: the port of a pvpanic device, or None.
        rtc: whether the kernel is to use the CMOS clock. It has kvmclock for the time of day, and
            one without interrupts makes user space wait for its ticks.
        ioapic: its guest-physical address.
        timer_pin: the IOAPIC's input at which GSI 0 arrives, as in ``pc.gsi_routes()``.
        pm_base: the ports of ``PowerManagement``.
        reset: the port of ``ResetControl``.
        pic: whether there is a pair of 8259As. Without them no timer hangs on GSI 0 either, and it
            has no override.
        pci: whether there is a PCI bus, with the windows of ``pc.PCI_PORTS`` and ``PCI_MEMORY``.
        generation_id: the 16 bytes of the VM generation ID, which get a place before the DSDT, or
            None: there is no such device.

    Raises:
        ValueError: the base, the generation ID, or more tables than there is room from it on.
    """
    if base % 64 or not 0 <= base < 1 << 32:
        raise ValueError(f"ACPI tables begin on a 64-byte boundary below 4 GiB, not at {base:#x}")
    ids = range(cpus) if isinstance(cpus, int) else cpus
    if not ids:
        raise ValueError("a machine has at least one processor")
    rsdp_at = base
    facs_at = base + 64
    identity = [] if generation_id is None else [(facs_at + 64, GenerationId(generation_id))]
    dsdt_at = facs_at + 64 + GenerationId.SIZE * len(identity)
    devices = _identity_devices(facs_at + 64) if identity else []
    dsdt = Dsdt(_definition_block(len(ids), com1, virtio, edge, pvpanic, rtc, pci, devices))
    fadt = _fadt(facs_at, dsdt_at, pm_base, reset, com1, rtc)
    fadt_at = _after(dsdt_at, dsdt)
    madt = _madt(ids, ioapic, timer_pin, pic)
    madt_at = _after(fadt_at, fadt)
    rsdt, rsdt_at = Rsdt([fadt_at, madt_at]), _after(madt_at, madt)
    xsdt, xsdt_at = Xsdt([fadt_at, madt_at]), _after(rsdt_at, rsdt)
    acpi = Acpi(
        base,
        [
            (rsdp_at, Rsdp(rsdt_at, xsdt_at)),
            (facs_at, Facs()),
            *identity,
            (dsdt_at, dsdt),
            (fadt_at, fadt),
            (madt_at, madt),
            (rsdt_at, rsdt),
            (xsdt_at, xsdt),
        ],
    )
    limit = 1 << 20 if base < 1 << 20 else 1 << 32
    if base + len(acpi.blob) > limit:
        raise ValueError(f"{len(acpi.blob):#x} bytes of ACPI tables at {base:#x} pass {limit:#x}")
    return acpi


def _after(address: int, table: Table) -> int:
    return address + len(table.encode()) + 15 & ~15


def _fadt(facs: int, dsdt: int, pm_base: int, reset: int, com1: bool, rtc: bool) -> Fadt:
    """Describe the fixed hardware (5.2.9), in ACPI mode from the start: there is no SMI command."""
    event, control, timer = (pm_base + at for at in (pc.PM_EVENT, pc.PM_CONTROL, pc.PM_TIMER))
    boot_arch = Fadt.VGA_NOT_PRESENT
    if com1:
        boot_arch |= Fadt.LEGACY_DEVICES
    if not rtc:
        boot_arch |= Fadt.CMOS_RTC_NOT_PRESENT
    return Fadt(
        firmware_ctrl=facs,
        dsdt=dsdt,
        x_dsdt=dsdt,
        sci_int=pc.SCI_GSI,
        pm1a_evt_blk=event,
        pm1_evt_len=4,
        x_pm1a_evt_blk=io_register(event, 4),
        pm1a_cnt_blk=control,
        pm1_cnt_len=2,
        x_pm1a_cnt_blk=io_register(control, 2),
        pm_tmr_blk=timer,
        pm_tmr_len=4,
        x_pm_tmr_blk=io_register(timer, 4),
        p_lvl2_lat=NO_C2,
        p_lvl3_lat=NO_C3,
        century=pc.CMOS_CENTURY if rtc else 0,
        iapc_boot_arch=boot_arch,
        flags=Fadt.WBINVD | Fadt.PROC_C1 | Fadt.SLP_BUTTON | Fadt.TMR_VAL_EXT | Fadt.RESET_REG_SUP,
        reset_reg=io_register(reset, 1),
        reset_value=pc.RESET_VALUE,
        hypervisor_vendor=b"pykvm",
    )


def _madt(ids: Sequence[int], ioapic: int, timer_pin: int, pic: bool) -> Madt:
    """Describe the interrupt controllers (5.2.12), with KVM's usual wiring."""
    entries: list[tuple[str, dict[str, Any]]] = []
    wide = False
    for uid, apic_id in enumerate(ids):
        members = {"uid": uid, "apic_id": apic_id, "flags": Madt.ENABLED}
        # The UID of a local APIC entry has 8 bits, and 255 means all.
        x2apic = apic_id >= MIN_X2APIC or uid >= MIN_X2APIC
        wide |= x2apic
        entries.append(("local-x2apic" if x2apic else "local-apic", members))
    entries.append(("io-apic", {"id": 0, "address": ioapic, "gsi_base": 0}))
    if pic and timer_pin != pc.TIMER_IRQ:
        entries.append(("override", {"source": pc.TIMER_IRQ, "gsi": timer_pin}))
    entries.append(
        (
            "override",
            {"source": pc.SCI_GSI, "gsi": pc.SCI_GSI, "flags": Madt.LEVEL_ACTIVE_HIGH},
        )
    )
    entries.append(("local-apic-nmi", {"uid": EVERY_CPU, "lint": 1}))
    if wide:
        entries.append(("local-x2apic-nmi", {"uid": 0xFFFF_FFFF, "lint": 1}))
    return Madt(pc.LAPIC, entries, Madt.PCAT_COMPAT if pic else 0)


def _definition_block(
    cpus: int,
    com1: bool,
    virtio: Sequence[tuple[int, int, int]],
    edge: bool,
    pvpanic: int | None,
    rtc: bool,
    pci: bool,
    more: Sequence[bytes],
) -> bytes:
    """Write the DSDT: what cannot be found by looking."""
    devices = [
        aml.device(
            f"C{uid:03X}",
            aml.name("_HID", aml.string("ACPI0007")),
            aml.name("_UID", aml.integer(uid)),
        )
        for uid in range(cpus)
    ]
    if com1:
        crs = aml.resources(aml.io(pc.COM1, 8), aml.irq(pc.COM1_GSI))
        devices.append(_device("COM1", aml.eisa_id("PNP0501"), 0, crs))
    if rtc:
        crs = aml.resources(aml.io(pc.CMOS, 2))
        devices.append(_device("RTC", aml.eisa_id("PNP0B00"), 0, crs))
    if pvpanic is not None:
        crs = aml.resources(aml.io(pvpanic, 1))
        devices.append(_device("PEVT", aml.string("QEMU0001"), 0, crs))
    for number, (first, size, gsi) in enumerate(virtio):
        crs = aml.resources(aml.memory32(first, size), aml.interrupt(gsi, edge=edge))
        devices.append(_device(f"V{number:03X}", aml.string("LNRO0005"), number, crs))
    if pci:
        devices.append(_device("PCI0", aml.eisa_id("PNP0A03"), 0, _pci_windows()))
    off = aml.integer(pc.SLEEP_TYPE_OFF)
    return aml.scope("\\_SB", *devices, *more) + aml.name(
        "\\_S5", aml.package(off, off, aml.integer(0), aml.integer(0))
    )


def _identity_devices(gpa: int) -> list[bytes]:
    """Tell of the VM generation ID, and of the interrupt by which the guest hears of a new one.

    Linux finds the device by its _CID, evaluates ADDR (low and high half of the address), and looks
    at the ID again at a notification of 0x80 (drivers/virt/vmgenid.c). A Generic Event Device
    (ACPI 6.5, 5.6.9) has no registers, so that a boot makes no exit for it.
    """
    text = aml.string("VM_Gen_Counter")
    halves = aml.package(aml.integer(gpa & 0xFFFF_FFFF), aml.integer(gpa >> 32))
    return [
        aml.device(
            "VGEN",
            aml.name("_HID", aml.string("PKVM0001")),  # the paper wants one that is our own
            aml.name("_CID", text),
            aml.name("_DDN", text),
            aml.name("ADDR", halves),
        ),
        aml.device(
            "GED",
            aml.name("_HID", aml.string("ACPI0013")),
            aml.name("_UID", aml.integer(0)),
            aml.name("_CRS", aml.resources(aml.interrupt(pc.IDENTITY_GSI, edge=True))),
            aml.method("_EVT", aml.notify("VGEN", 0x80), arguments=1, serialized=True),
        ),
    ]


def _pci_windows() -> bytes:
    """What the root of the PCI bus takes itself, and what it hands on."""
    return aml.resources(
        aml.window(aml.BUS_SPACE, 0, 0),
        aml.io(pc.PCI_ADDRESS, 8),
        aml.window(aml.IO_SPACE, pc.PCI_PORTS, pc.PCI_PORTS + pc.PCI_PORTS_LENGTH - 1),
        aml.window(aml.MEMORY_SPACE, pc.PCI_MEMORY, pc.PCI_MEMORY + pc.PCI_MEMORY_LENGTH - 1),
    )


def _device(name: str, hid: bytes, uid: int, crs: bytes) -> bytes:
    return aml.device(
        name,
        aml.name("_HID", hid),
        aml.name("_UID", aml.integer(uid)),
        aml.name("_CRS", crs),
    )
