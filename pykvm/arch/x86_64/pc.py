"""Where things are on a PC: ports, interrupt lines and guest-physical addresses.

What a stock kernel takes for granted has its address from the IBM PC and its heirs; what it is told
of by ACPI (marked so) could be anywhere, and is where QEMU and others have it.
"""

from __future__ import annotations

# ---- ports ---------------------------------------------------------------------------------------

KEYBOARD = 0x60
"""Keyboard controller: data; status and command at 0x64."""
CMOS = 0x70
"""CMOS index; data at 0x71."""
CMOS_CENTURY = 0x32
"""ACPI: the CMOS register of the century."""
POST = 0x80
FAST_A20 = 0x92
DEBUG_EXIT = 0xF4
"""QEMU's isa-debug-exit, where test set-ups have it."""
COM1 = 0x3F8
PVPANIC = 0x505
"""ACPI: device QEMU0001."""
FW_CFG = 0x510
PM_BASE = 0x600
"""ACPI: the fixed hardware's registers, 12 ports (``pykvm.devices.pm``)."""
PM_EVENT, PM_CONTROL, PM_TIMER = 0, 4, 8
"""Offsets there: PM1a event block, 4 bytes; PM1a control block, 2; PM timer, 4."""
SLEEP_TYPE_OFF = 5
"""ACPI: what is written into the control block's SLP_TYP to turn the machine off (``_S5``)."""
PCI_ADDRESS = 0xCF8
"""PCI configuration address; data at 0xcfc."""
PCI_PORTS, PCI_PORTS_LENGTH = 0xC000, 0x4000
"""ACPI: the ports that PCI devices may have."""
RESET = 0xCF9
"""ACPI: the reset register."""
RESET_VALUE = 0x06
"""ACPI: what is written there for a reset."""

# ---- interrupt lines -----------------------------------------------------------------------------

TIMER_IRQ = 0
COM1_GSI = 4
SCI_GSI = 9
"""ACPI: the system control interrupt, level-triggered and active high."""
VIRTIO_GSIS = (*range(16, 24), 5, 6, 7, 10, 11)
"""ACPI: interrupt lines of virtio-mmio devices, edge-triggered, in the order of their use."""
IDENTITY_GSI = 12
"""ACPI: says that the VM generation ID is another, as an edge. On PCs it is the mouse's, of which
the FADT says that there is none."""
ISA_IRQS = 16
IOAPIC_PINS = 24

FIRST_MSI_GSI = IOAPIC_PINS
"""GSIs from here on are message-signalled interrupts of PCI devices; the guest has no names for
them."""

TIMER_PIN = 2
"""The IOAPIC input at which the timer's line arrives on PCs, for the PIC hangs on input 0."""


def gsi_routes(timer_pin: int = TIMER_PIN) -> tuple[tuple[int, str, int], ...]:
    """Which GSI drives which pin of which chip, with the timer at an IOAPIC pin of choice.

    Returns:
        ``(gsi, chip, pin)``, chip one of ``"pic-master"``, ``"pic-slave"`` and ``"ioapic"``, for
        KVM_SET_GSI_ROUTING (api.rst 4.52). KVM's own table has the timer at IOAPIC pin 0.
    """
    routes: list[tuple[int, str, int]] = []
    for gsi in range(ISA_IRQS):
        routes.append((gsi, "pic-master" if gsi < 8 else "pic-slave", gsi % 8))
    for gsi in range(IOAPIC_PINS):
        pin = timer_pin if gsi == TIMER_IRQ else gsi
        if gsi == TIMER_IRQ or gsi != timer_pin:
            routes.append((gsi, "ioapic", pin))
    return tuple(routes)


GSI_ROUTES = gsi_routes()
"""The routes that the MADT's override of the timer wants; GSI 2 reaches the PIC alone."""

# ---- guest-physical addresses --------------------------------------------------------------------

ACPI_BASE = 0xE0000
"""Where tables begin: kernels look for ACPI's root pointer from here to 0xfffff."""
MP_BASE = 0xF0000
"""The MultiProcessor tables; looked for from here to 0xfffff."""
VIRTIO_MMIO = 0xD0000000
"""ACPI: where virtio-mmio windows begin; one page each."""
PCI_MEMORY, PCI_MEMORY_LENGTH = 0xE0000000, 0x10000000
"""ACPI: the addresses that PCI devices may have; no RAM is there, see ``boot.layout``."""
IOAPIC = 0xFEC00000
LAPIC = 0xFEE00000
