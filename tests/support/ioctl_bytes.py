"""Ioctls and the bytes of their arguments: by hand, from the layouts of the kernel's headers."""

from __future__ import annotations

from struct import pack
from typing import Any

# Ioctls whose argument is a plain number, or nothing: (object, method, arguments, number).
NUMBERS: list[tuple[str, str, tuple[Any, ...], int]] = [
    ("kvm", "get_api_version", (), 0),
    ("kvm", "get_vcpu_mmap_size", (), 0),
    ("kvm", "create_vm", (4,), 4),
    ("vm", "create_vcpu", (7,), 7),
    ("vm", "set_nr_mmu_pages", (64,), 64),
    ("vm", "get_nr_mmu_pages", (), 0),
    ("vm", "set_tss_addr", (0xFFFBD000,), 0xFFFBD000),
    ("vm", "set_boot_cpu_id", (3,), 3),
    ("vm", "create_irqchip", (), 0),
    ("vm", "reset_dirty_rings", (), 0),
    ("vm", "set_tsc_khz", (2_000_000,), 2_000_000),
    ("vm", "get_tsc_khz", (), 0),
    ("vcpu", "run", (), 0),
    ("vcpu", "nmi", (), 0),
    ("vcpu", "smi", (), 0),
    ("vcpu", "kvmclock_ctrl", (), 0),
    ("vcpu", "set_tsc_khz", (1_000_000,), 1_000_000),
    ("vcpu", "get_tsc_khz", (), 0),
    ("vcpu", "set_signal_mask", (None,), 0),
]

# Ioctls that are given a structure: (object, method, arguments, its bytes).
STRUCTS: list[tuple[str, str, dict[str, Any], bytes]] = [
    (
        "vm",
        "set_user_memory_region",
        {
            "slot": 0x10002,
            "flags": 3,
            "guest_phys_addr": 0x1_0000_0000,
            "memory_size": 0x20_0000,
            "userspace_addr": 0x7F00_0000_0000,
        },
        pack("<IIQQQ", 0x10002, 3, 0x1_0000_0000, 0x20_0000, 0x7F00_0000_0000),
    ),
    (
        "vm",
        "set_user_memory_region2",
        {
            "slot": 1,
            "flags": 4,
            "guest_phys_addr": 0x1000,
            "memory_size": 0x2000,
            "userspace_addr": 0x3000,
            "guest_memfd": 9,
            "guest_memfd_offset": 0x4000,
        },
        pack("<IIQQQQII112x", 1, 4, 0x1000, 0x2000, 0x3000, 0x4000, 9, 0),
    ),
    (
        "vm",
        "create_guest_memfd",
        {"size": 0x20_0000, "flags": 3},
        pack("<QQ48x", 0x20_0000, 3),
    ),
    (
        "vm",
        "set_memory_attributes",
        {"address": 0x1000, "size": 0x2000, "attributes": 8, "flags": 0},
        pack("<QQQQ", 0x1000, 0x2000, 8, 0),
    ),
    (
        "vm",
        "register_coalesced_mmio",
        {"addr": 0xD000_0000, "size": 0x100},
        pack("<QII", 0xD000_0000, 0x100, 0),
    ),
    (
        "vm",
        "unregister_coalesced_mmio",
        {"addr": 0x70, "size": 2, "pio": True},
        pack("<QII", 0x70, 2, 1),
    ),
    ("vm", "set_identity_map_addr", {"addr": 0xFFFB_C000}, pack("<Q", 0xFFFB_C000)),
    ("vm", "create_pit2", {"flags": 1}, pack("<I60x", 1)),
    ("vm", "reinject_control", {"pit_reinject": True}, pack("<B31x", 1)),
    ("vm", "irq_line", {"irq": 5, "level": 1}, pack("<II", 5, 1)),
    ("vm", "irq_line_status", {"irq": 23, "level": 0}, pack("<II", 23, 0)),
    (
        "vm",
        "irqfd",
        {"fd": 8, "gsi": 24, "flags": 2, "resamplefd": 9},
        pack("<IIII16x", 8, 24, 2, 9),
    ),
    (
        "vm",
        "ioeventfd",
        {"addr": 0x510, "len": 2, "fd": 8, "datamatch": 0xBEEF, "flags": 2},
        pack("<QQIiI36x", 0xBEEF, 0x510, 2, 8, 1 | 2),
    ),
    (
        "vm",
        "ioeventfd",
        {"addr": 0xFE00_0000, "len": 0, "fd": 8, "flags": 4},
        pack("<QQIiI36x", 0, 0xFE00_0000, 0, 8, 4),
    ),
    (
        "vm",
        "signal_msi",
        {"address_lo": 0xFEE0_1000, "data": 0x4041, "address_hi": 1, "flags": 1, "devid": 6},
        pack("<IIIII12x", 0xFEE0_1000, 1, 0x4041, 1, 6),
    ),
    ("vm", "create_device", {"type": 4, "flags": 1}, pack("<III", 4, 0, 1)),
    (
        "vm",
        "set_pmu_event_filter",
        {"action": 1, "events": [0xC0, 0x1_003C], "fixed_counter_bitmap": 5, "flags": 1},
        pack("<IIII16xQQ", 1, 2, 5, 1, 0xC0, 0x1_003C),
    ),
    ("vm", "set_clock", {"data": 123_456_789}, pack("<QI36x", 123_456_789, 0)),
    ("vcpu", "set_mp_state", {"mp_state": 3}, pack("<I", 3)),
    ("vcpu", "interrupt", {"irq": 0x20}, pack("<I", 0x20)),
    ("vcpu", "translate", {"linear_address": 0x40_1234}, pack("<Q16x", 0x40_1234)),
    (
        "vcpu",
        "set_guest_debug",
        {"control": 0x2_0001, "debugreg": [0x1000, 0, 0, 0, 0, 0, 0, 0x402]},
        pack("<II8Q", 0x2_0001, 0, 0x1000, 0, 0, 0, 0, 0, 0, 0x402),
    ),
    ("vcpu", "set_signal_mask", {"signals": [1, 10, 64]}, pack("<IQ", 8, 1 | 1 << 9 | 1 << 63)),
    (
        "vcpu",
        "tpr_access_reporting",
        {"enabled": True},
        pack("<II32x", 1, 0),
    ),
    ("vcpu", "set_vapic_addr", {"vapic_addr": 0x9000}, pack("<Q", 0x9000)),
    ("vcpu", "x86_setup_mce", {"mcg_cap": 0x100_000A}, pack("<Q", 0x100_000A)),
    (
        "vcpu",
        "x86_set_mce",
        {"bank": 2, "status": 1 << 63, "mcg_status": 5, "addr": 0x1234, "misc": 0x8C},
        pack("<QQQQB31x", 1 << 63, 0x1234, 0x8C, 5, 2),
    ),
    (
        "vcpu",
        "pre_fault_memory",
        {"gpa": 0x1000, "size": 0x4000, "flags": 0},
        pack("<QQQ40x", 0x1000, 0x4000, 0),
    ),
    (
        "vcpu",
        "set_msrs",
        {"values": {0xC000_0080: 0x500, 0x10: 7}},
        pack("<IIIIQIIQ", 2, 0, 0xC000_0080, 0, 0x500, 0x10, 0, 7),
    ),
]
