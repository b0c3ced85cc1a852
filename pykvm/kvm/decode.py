"""Kernel structures as text, for :mod:`pykvm.kvm.tracing`: any ``struct kvm_*``, by its cffi type.

A new structure needs nothing here. What a type cannot tell (that a number is a set of flags, which
member of a union counts, how many entries an array has) stands in the few tables below.
"""

from __future__ import annotations

from pykvm._abi import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: (structure, member): prefix of the constants that are its bits.
_FLAGS = {
    ("kvm_userspace_memory_region", "flags"): "KVM_MEM_",
    ("kvm_userspace_memory_region2", "flags"): "KVM_MEM_",
    ("kvm_create_guest_memfd", "flags"): "GUEST_MEMFD_FLAG_",
    ("kvm_memory_attributes", "attributes"): "KVM_MEMORY_ATTRIBUTE_",
    ("kvm_irqfd", "flags"): "KVM_IRQFD_FLAG_",
    ("kvm_ioeventfd", "flags"): "KVM_IOEVENTFD_FLAG_",
    ("kvm_guest_debug", "control"): "KVM_GUESTDBG_",
    ("kvm_vcpu_events", "flags"): "KVM_VCPUEVENT_VALID_",
    ("kvm_clock_data", "flags"): "KVM_CLOCK_",
    ("kvm_sregs2", "flags"): "KVM_SREGS2_FLAGS_",
    ("kvm_cpuid_entry2", "flags"): "KVM_CPUID_FLAG_",
    ("kvm_create_device", "flags"): "KVM_CREATE_DEVICE_",
    ("kvm_pit_state2", "flags"): "KVM_PIT_FLAGS_",
    ("kvm_msr_filter_range", "flags"): "KVM_MSR_FILTER_",
    ("kvm_pmu_event_filter", "flags"): "KVM_PMU_EVENT_FLAG_",
}
#: (structure, member) or ioctl: prefix of the constants that it is one of.
_ENUMS = {
    ("kvm_mp_state", "mp_state"): "KVM_MP_STATE_",
    ("kvm_enable_cap", "cap"): "KVM_CAP_",
    ("kvm_create_device", "type"): "KVM_DEV_TYPE_",
    ("kvm_irqchip", "chip_id"): "KVM_IRQCHIP_",
    ("kvm_irq_routing_irqchip", "irqchip"): "KVM_IRQCHIP_",
    ("kvm_irq_routing_entry", "type"): "KVM_IRQ_ROUTING_",
    ("kvm_pmu_event_filter", "action"): "KVM_PMU_EVENT_",
    "KVM_CHECK_EXTENSION": "KVM_CAP_",
}
#: (structure, union): the member that says which of its own members counts, and by what value.
_UNIONS = {
    ("kvm_irqchip", "chip"): ("chip_id", {lib.KVM_IRQCHIP_IOAPIC: "ioapic"}, "pic"),
    ("kvm_irq_routing_entry", "u"): (
        "type",
        {
            lib.KVM_IRQ_ROUTING_IRQCHIP: "irqchip",
            lib.KVM_IRQ_ROUTING_MSI: "msi",
            lib.KVM_IRQ_ROUTING_HV_SINT: "hv_sint",
        },
        "pad",
    ),
}
#: Members that count the entries of the array at the structure's end.
_COUNTS = ("nmsrs", "nent", "nr", "nevents", "n", "len")
#: Members of up to 32 bits that read better in hex; those of 64 bits print so anyway.
_HEX = frozenset(
    (
        "selector",
        "limit",
        "function",
        "index",
        "eax",
        "ebx",
        "ecx",
        "edx",
        "indices",
        "address_lo",
        "address_hi",
        "data",
        "mxcsr",
        "fcw",
        "fsw",
        "msr",
        "phys_addr",
        "error_code",
        "base",
    )
)
#: Members of 64 bits that are amounts.
_DECIMAL = frozenset(("clock", "realtime", "host_tsc", "n", "count_load_time"))
_PADDING = ("pad", "reserved", "padding")
_MANY = 8  # entries of an array that are printed
_BYTES = 16  # bytes of one


def constant_name(prefix: str, value: int) -> str:
    """The header's name of a value, among those that begin with ``prefix``; or the number."""
    for name in _names(prefix):
        if getattr(lib, name) == value:
            return name
    return str(value)


def flag_names(prefix: str, value: int) -> str:
    """The header's names of the bits that are set, joined by ``|``; what has no name in hex."""
    if not value:
        return "0"
    parts = []
    for name in _names(prefix):
        bit = getattr(lib, name)
        if bit & value and not bit & (bit - 1):
            parts.append(name)
            value &= ~bit
    if value:
        parts.append(hex(value))
    return "|".join(parts)


def _names(prefix: str) -> list[str]:
    return [name for name in dir(lib) if name.startswith(prefix)]


def number(ioctl: str, value: int) -> str:
    """The argument of an ioctl that takes a number."""
    prefix = _ENUMS.get(ioctl)
    if prefix:
        return constant_name(prefix, value)
    return hex(value) if ioctl.endswith("_ADDR") else str(value)


def snapshot(pointer: Any, most: int | None = None) -> bytes:
    """The bytes that an ioctl's argument has now, the entries behind the structure included.

    Args:
        pointer: the argument.
        most: bytes it had before the call, if that is over: a count that KVM has raised since
            does not make it longer.
    """
    size = _size(pointer)
    return bytes(ffi.buffer(pointer, size if most is None else min(size, most)))


def _size(pointer: Any) -> int:
    ctype = ffi.typeof(pointer).item
    size = int(ffi.sizeof(ctype))
    array = _flexible(ctype)
    if array is None:
        return size
    field = array[1]
    item = int(ffi.sizeof(field.type.item))
    return max(size, int(field.offset) + _count(pointer, ctype) * item)


def _flexible(ctype: Any) -> tuple[str, Any] | None:
    """The array of no fixed length that ends a structure, if it has one."""
    if ctype.kind != "struct" or not ctype.fields:
        return None
    name, field = ctype.fields[-1]
    is_open = field.type.kind == "array" and field.type.length is None
    return (name, field) if is_open else None


def _count(struct: Any, ctype: Any) -> int:
    for name, _ in ctype.fields:
        if name in _COUNTS:
            return int(getattr(struct, name))
    return 0


def argument(pointer: Any, raw: bytes, before: bytes | None = None) -> str:
    """An ioctl's structure as text.

    Args:
        pointer: the argument as it was given, for its type.
        raw: its bytes (:func:`snapshot`).
        before: its bytes before the call: then only members that changed are printed.
    """
    ctype = ffi.typeof(pointer).item
    if ctype.kind == "primitive":
        return f"[{int.from_bytes(raw, 'little'):#x}]"
    keep = ffi.new("char[]", raw)  # aligned, unlike bytes
    struct = ffi.cast(ffi.typeof(pointer), keep)
    if before is None:
        return _struct(struct[0], ctype, len(raw))
    old = ffi.new("char[]", before.ljust(len(raw), b"\0"))
    return _struct(struct[0], ctype, len(raw), ffi.cast(ffi.typeof(pointer), old)[0])


def _struct(struct: Any, ctype: Any, size: int, old: Any = None) -> str:
    tag = ctype.cname.removeprefix("struct ")
    if tag == "kvm_msr_entry":
        return f"[{struct.index:#x}]={struct.data:#x}"
    if tag == "kvm_lapic_state":
        return _lapic(struct)
    if tag == "kvm_irq_level" and old is not None:
        return f"{{status={struct.status}}}"
    parts = []
    end = 0
    for name, field in ctype.fields:
        kind = field.type
        if name.startswith(_PADDING) or field.offset < end:
            continue  # padding, or another member of the same unnamed union
        value = getattr(struct, name)
        before = None if old is None else getattr(old, name)
        if _is_open(kind):
            room = (size - field.offset) // int(ffi.sizeof(kind.item))
            count = min(_count(struct, ctype), room)
            same = before is not None and _raw(value, kind, count) == _raw(before, kind, count)
            if count and not same:
                parts.append(f"{name}={_array(value, kind.item, count, tag, name)}")
            continue
        # Members of bits share their offset, and hide nothing.
        end = field.offset + (0 if field.bitsize > 0 else int(ffi.sizeof(kind)))
        if before is not None and _same(value, before, kind):
            continue
        if (tag, name) in _UNIONS:
            selector, members, other = _UNIONS[tag, name]
            member = members.get(getattr(struct, selector), other)
            kind, value = dict(kind.fields)[member].type, getattr(value, member)
            parts.append(f"{name}.{member}={_value(value, kind, tag, name)}")
        else:
            parts.append(f"{name}={_value(value, kind, tag, name)}")
    return "{" + ", ".join(parts) + "}"


def _lapic(struct: Any) -> str:
    """The APIC's registers that are not zero; each has the first 4 of 16 bytes."""
    words = ffi.cast("uint32_t *", struct.regs)
    registers = ((offset, words[offset // 4]) for offset in range(0, lib.KVM_APIC_REG_SIZE, 16))
    return "{" + ", ".join(f"[{offset:#x}]={word:#x}" for offset, word in registers if word) + "}"


def _is_open(ctype: Any) -> bool:
    return bool(ctype.kind == "array" and ctype.length is None)


def _raw(value: Any, ctype: Any, count: int) -> bytes:
    return bytes(ffi.buffer(ffi.cast("char *", value), count * int(ffi.sizeof(ctype.item))))


def _same(value: Any, old: Any, ctype: Any) -> bool:
    if ctype.kind in ("struct", "union", "array"):
        return bytes(ffi.buffer(value)) == bytes(ffi.buffer(old))
    return bool(value == old)


def _value(value: Any, ctype: Any, tag: str, name: str) -> str:
    kind = ctype.kind
    if kind == "struct":
        return _struct(value, ctype, int(ffi.sizeof(ctype)))
    if kind == "union":  # its first member stands for all
        member, field = ctype.fields[0]
        return _value(getattr(value, member), field.type, tag, name)
    if kind == "array":
        return _array(value, ctype.item, ctype.length, tag, name)
    if kind == "pointer":
        address = int(ffi.cast("uintptr_t", value))
        return f"{address:#x}" if address else "NULL"
    if isinstance(value, bytes):
        value = value[0]
    prefix = _FLAGS.get((tag, name))
    if prefix:
        return flag_names(prefix, value)
    prefix = _ENUMS.get((tag, name))
    if prefix:
        return constant_name(prefix, value)
    wide = ffi.sizeof(ctype) == 8 and name not in _DECIMAL
    return hex(value) if wide or name in _HEX else str(value)


def _array(value: Any, item: Any, count: int, tag: str, name: str) -> str:
    size = int(ffi.sizeof(item))
    raw = bytes(ffi.buffer(ffi.cast("char *", value), count * size))
    if size == 1:
        if not any(raw):
            return f"[0 × {count}]"
        more = f" … {count} bytes" if count > _BYTES else ""
        return f"[{raw[:_BYTES].hex(' ')}{more}]"
    shown = [_value(value[i], item, tag, name) for i in range(min(count, _MANY))]
    if count > _MANY:
        if not any(raw):
            return f"[0 × {count}]"
        shown.append(f"… {count - _MANY} more")
    return "[" + ", ".join(shown) + "]"
