"""All of a vCPU's state, taken in the order that KVM needs and put back in the order it needs.

Taking: KVM_GET_MP_STATE first, for it takes a pending INIT or start-up IPI in; the local APIC
before the MSRs, as reading it may change it. Putting back: SREGS before the local APIC (its base)
and before nested state (EFER.SVME); REGS before the events, as setting them drops a pending
exception; the local APIC before the MSRs (TSC deadline).
"""

from __future__ import annotations

from pykvm._abi import ffi, lib
from pykvm.errors import CapabilityError, PykvmError
from pykvm.kvm.flex import MsrError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from pykvm.kvm import Vcpu

TSC = 0x10
"""IA32_TIME_STAMP_COUNTER."""
COUNTERS = (0x40000010, 0x40000020)
"""Hyper-V's VP_RUNTIME and TIME_REF_COUNT, which only count; KVM derives both."""
_XSTATE_BV = 0x200
"""Offset in the XSAVE area of which components are in use. KVM writes the others' initial values
out, so their bits say nothing; and processors differ in when they clear them (SDM Vol. 1, 13.6)."""

_VMCB_DR6 = 0x80 + 0x568
"""Offset of DR6 in SVM's nested state (APM Vol. 2, appendix B). It is what the processor left
there, and KVM does not take it back: DR6 is among the debug registers."""

STRUCTS = {
    "regs": ("struct kvm_regs", "KVM_SET_REGS"),
    "sregs": ("struct kvm_sregs", "KVM_SET_SREGS"),
    "sregs2": ("struct kvm_sregs2", "KVM_SET_SREGS2"),
    "nested": ("struct kvm_nested_state", "KVM_SET_NESTED_STATE"),
    "fpu": ("struct kvm_fpu", "KVM_SET_FPU"),
    "xsave": ("struct kvm_xsave", "KVM_SET_XSAVE"),
    "xcrs": ("struct kvm_xcrs", "KVM_SET_XCRS"),
    "debugregs": ("struct kvm_debugregs", "KVM_SET_DEBUGREGS"),
    "lapic": ("struct kvm_lapic_state", "KVM_SET_LAPIC"),
    "events": ("struct kvm_vcpu_events", "KVM_SET_VCPU_EVENTS"),
    "mp_state": ("struct kvm_mp_state", "KVM_SET_MP_STATE"),
}
"""Each part's structure and ioctl."""

ORDER = (
    "sregs", "sregs2", "nested", "regs", "xsave", "fpu", "xcrs", "debugregs", "tsc", "lapic",
    "msrs", "events", "mp_state",
)  # fmt: skip
"""In which they are put back."""


class VcpuState:
    """The state of one vCPU, as plain values.

    Attributes:
        parts: the bytes of KVM's structures, by name (:data:`STRUCTS`).
        msrs: value by index.
        tsc: ``(offset, host TSC)``, or None where KVM does not tell the offset.
    """

    __slots__ = ("_made", "msrs", "parts", "tsc")

    def __init__(
        self, parts: dict[str, bytes], msrs: dict[int, int], tsc: tuple[int, int] | None
    ) -> None:
        self.parts = parts
        self.msrs = msrs
        self.tsc = tsc
        self._made: dict[str | tuple[str, int], Any] = {}

    def shared(self, name: str, at_least: int = 0) -> Any:
        """A part as a cffi structure for KVM to read: one for all who restore this."""
        made = self._made.get((name, at_least))
        if made is None:
            made = self._made[name, at_least] = self.struct(name, at_least)
        return made

    def msr_list(self, vcpu: Vcpu, anew: bool = False) -> tuple[Any, int]:
        """The MSRs that ``vcpu`` takes, as a ``struct kvm_msrs *``, and how many they are.

        Asked once for all vCPUs that look alike; ``anew``: ask this one.
        """
        like = ("lapic" in self.parts, *self.msrs)
        refused = None if anew else _refused.get(like)
        if refused is None or any(self.msrs[index] != value for index, value in refused.items()):
            good = settable(vcpu, self.msrs)
            _refused[like] = refused = {
                index: value for index, value in self.msrs.items() if index not in good
            }
            self._made.pop("msrs", None)
        made = self._made.get("msrs")
        if made is None:
            good = {index: value for index, value in self.msrs.items() if index not in refused}
            made = self._made["msrs"] = msr_list(good), len(good)
        return made

    def struct(self, name: str, at_least: int = 0) -> Any:
        """A part as a new cffi structure, with zeros up to ``at_least`` bytes.

        KVM_SET_XSAVE reads KVM_CAP_XSAVE2 bytes, which may be more than where this was taken; to
        the components that its header does not name, zeros say nothing.
        """
        type, _ = STRUCTS[name]
        data = self.parts[name]
        room = bytearray(max(ffi.sizeof(type), len(data), at_least))
        room[: len(data)] = data
        return ffi.from_buffer(f"{type} *", room)


def capture(vcpu: Vcpu, irqchip: bool) -> VcpuState:
    """Take the state of a vCPU that does not run and has no access open."""
    vm = vcpu.vm

    def has(cap: str) -> bool:
        try:
            return bool(vm.need(cap))
        except CapabilityError:
            return False

    taken: dict[str, Any] = {}
    if irqchip:
        mp_state = vcpu.get_mp_state()
        taken["mp_state"] = ffi.new("struct kvm_mp_state *", {"mp_state": mp_state})
    taken["regs"] = vcpu.get_regs()
    taken["sregs"] = sregs = vcpu.get_sregs()
    if _pae(sregs) and has("KVM_CAP_SREGS2"):
        taken["sregs2"] = vcpu.get_sregs2()
    if has("KVM_CAP_XSAVE2"):
        taken["xsave"] = vcpu.get_xsave2()
    elif has("KVM_CAP_XSAVE"):
        taken["xsave"] = vcpu.get_xsave()
    else:
        taken["fpu"] = vcpu.get_fpu()
    if has("KVM_CAP_XCRS"):
        taken["xcrs"] = vcpu.get_xcrs()
    if has("KVM_CAP_DEBUGREGS"):
        taken["debugregs"] = vcpu.get_debugregs()
    if irqchip:
        taken["lapic"] = vcpu.get_lapic()
    parts = {name: bytes(ffi.buffer(struct)) for name, struct in taken.items()}
    if has("KVM_CAP_NESTED_STATE"):
        nested = vcpu.get_nested_state()
        if nested.size > 0:
            parts["nested"] = bytes(ffi.buffer(ffi.cast("char *", nested), nested.size))
    msrs = _msrs(vcpu)
    tsc = _tsc_offset(vcpu)
    if tsc is not None:
        msrs.pop(TSC, None)
    if has("KVM_CAP_VCPU_EVENTS"):
        parts["events"] = bytes(ffi.buffer(vcpu.get_vcpu_events()))
    return VcpuState(parts, msrs, tsc)


def _pae(sregs: Any) -> bool:
    """Whether the four page-directory pointers are registers: PAE paging outside long mode."""
    return bool(sregs.cr0 >> 31 and sregs.cr4 >> 5 & 1 and not sregs.efer >> 10 & 1)


def _msrs(vcpu: Vcpu) -> dict[int, int]:
    wanted = [index for index in vcpu.vm.kvm.get_msr_index_list() if index not in COUNTERS]
    while True:
        try:
            return vcpu.get_msrs(wanted)
        except MsrError as error:
            wanted.remove(error.index)  # in the list, but not in this vCPU's CPUID


def _tsc_offset(vcpu: Vcpu) -> tuple[int, int] | None:
    """What KVM adds to the host's TSC, and the host's TSC now (KVM_VCPU_TSC_CTRL, devices/vcpu)."""
    group, attr = lib.KVM_VCPU_TSC_CTRL, lib.KVM_VCPU_TSC_OFFSET
    try:
        if not vcpu.has_device_attr(group, attr):
            return None
        offset = vcpu.get_device_attr(group, attr)
    except PykvmError:
        return None
    return int.from_bytes(offset, "little"), int(lib.pykvm_tsc())


_refused: dict[tuple[int, ...], dict[int, int]] = {}
"""By which MSRs were asked: those of them that this host does not take back, and their values."""


def settable(vcpu: Vcpu, values: dict[int, int]) -> dict[int, int]:
    """Set MSRs, and return those that take it; one that refuses the value it has is left out.

    Raises:
        MsrError: one refuses a value that it does not have.
    """
    left = dict(values)
    while True:
        try:
            vcpu.set_msrs(left)
        except MsrError as error:
            if _now(vcpu, error.index) != left[error.index]:
                raise
            del left[error.index]
            continue
        return left


def _now(vcpu: Vcpu, index: int) -> int | None:
    try:
        return vcpu.get_msrs([index])[index]
    except MsrError:
        return None


def msr_list(values: dict[int, int]) -> Any:
    """A ``struct kvm_msrs *``."""
    made = ffi.new("struct kvm_msrs *", {"nmsrs": len(values), "entries": len(values)})
    for entry, (index, value) in enumerate(values.items()):
        made.entries[entry].index = index
        made.entries[entry].data = value
    return made


def differences(a: VcpuState, b: VcpuState) -> Iterable[tuple[str, int, int]]:
    """What differs, field by field: (name, value there, value here); of arrays each element."""
    for name in ("regs", "sregs", "debugregs", "xcrs", "mp_state", "events", "lapic"):
        if name in a.parts and name in b.parts and a.parts[name] != b.parts[name]:
            old_struct, new_struct = a.struct(name), b.struct(name)  # they own the bytes
            yield from _fields(name, old_struct[0], new_struct[0])
    for name in ("xsave", "fpu", "nested"):
        old, new = a.parts.get(name, b""), b.parts.get(name, b"")
        if old != new:
            for at in range(0, max(len(old), len(new)), 8):
                one, two = old[at : at + 8], new[at : at + 8]
                if one != two and not _says_nothing(name, at, old):
                    values = int.from_bytes(one, "little"), int.from_bytes(two, "little")
                    yield (f"{name}+{at:#x}", *values)
    for index in sorted({*a.msrs, *b.msrs} - {TSC}):
        one_msr, two_msr = a.msrs.get(index, 0), b.msrs.get(index, 0)
        if one_msr != two_msr:
            yield f"msr {index:#x}", one_msr, two_msr


def _says_nothing(name: str, at: int, data: bytes) -> bool:
    """Whether eight bytes of a part may differ without the guest ever seeing it."""
    if name == "nested":
        is_svm = int.from_bytes(data[2:4], "little") == lib.KVM_STATE_NESTED_FORMAT_SVM
        return is_svm and at == _VMCB_DR6
    return (name, at) == ("xsave", _XSTATE_BV)


def _fields(name: str, a: Any, b: Any) -> Iterable[tuple[str, int, int]]:
    type = ffi.typeof(a)
    if type.kind == "array":
        for at in range(type.length):
            yield from _element(f"{name}[{at}]", a[at], b[at])
        return
    for field, _ in type.fields:
        yield from _element(f"{name}.{field}", getattr(a, field), getattr(b, field))


def _element(name: str, a: Any, b: Any) -> Iterable[tuple[str, int, int]]:
    if isinstance(a, ffi.CData):
        yield from _fields(name, a, b)
    elif a != b:
        yield (
            name,
            int.from_bytes(a, "little") if isinstance(a, bytes) else int(a),
            (int.from_bytes(b, "little") if isinstance(b, bytes) else int(b)),
        )
