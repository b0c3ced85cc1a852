"""vCPU ioctls that read and write the processor's state: registers, FPU, APIC, events."""

from __future__ import annotations

import errno

from pykvm._abi import ffi
from pykvm.errors import KvmError

from .attrs import AttrWriter
from .flex import get, pointer
from .ioctl import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .handle import BytesLike
    from .vm import Vm

NESTED_STATE_HEADER = 128  # sizeof(struct kvm_nested_state): the header without its data


class StateMixin(AttrWriter):
    """The state of a :class:`Vcpu`.

    The getters return a new cffi structure that belongs to the caller; the setters take a pointer
    to one or the structure itself. A vCPU must not be running meanwhile: KVM makes the ioctl wait
    until KVM_RUN returns.
    """

    __slots__ = ("vm",)

    vm: Vm

    def need(self, cap: str) -> int:
        """What KVM says of a capability for this vCPU's VM; CapabilityError if it is missing."""
        return self.vm.need(cap)

    def get_regs(self) -> Any:
        """KVM_GET_REGS (api.rst 4.11): the general registers, a ``struct kvm_regs *``."""
        regs = ffi.new("struct kvm_regs *")
        call(self, "KVM_GET_REGS", regs)
        return regs

    def set_regs(self, regs: Any) -> None:
        """KVM_SET_REGS (api.rst 4.12): write all general registers, RIP and RFLAGS.

        A pending exception is dropped by it.
        """
        call(self, "KVM_SET_REGS", pointer(regs, "struct kvm_regs *"))

    def get_sregs(self) -> Any:
        """KVM_GET_SREGS (api.rst 4.13): segments, tables, CRs, EFER: ``struct kvm_sregs *``."""
        sregs = ffi.new("struct kvm_sregs *")
        call(self, "KVM_GET_SREGS", sregs)
        return sregs

    def set_sregs(self, sregs: Any) -> None:
        """KVM_SET_SREGS (api.rst 4.14): write all of ``struct kvm_sregs``.

        Errors: EINVAL for control registers that no processor could have together (EFER.LME and
        CR0.PG without CR4.PAE or EFER.LMA, reserved bits, CR4 bits that the CPUID lacks).
        """
        call(self, "KVM_SET_SREGS", pointer(sregs, "struct kvm_sregs *"))

    def get_sregs2(self) -> Any:
        """KVM_GET_SREGS2 (api.rst 4.131): as :meth:`get_sregs`, with PAE's PDPTRs.

        Returns: ``struct kvm_sregs2 *``; ``pdptrs`` count with KVM_SREGS2_FLAGS_PDPTRS_VALID in
        ``flags``. It has no ``interrupt_bitmap``. Needs KVM_CAP_SREGS2.
        """
        self.need("KVM_CAP_SREGS2")
        return get(self, "KVM_GET_SREGS2", "struct kvm_sregs2 *")

    def set_sregs2(self, sregs2: Any) -> None:
        """KVM_SET_SREGS2 (api.rst 4.132): write all of ``struct kvm_sregs2``.

        Needs KVM_CAP_SREGS2. Errors: as :meth:`set_sregs`; EINVAL for PDPTRs without PAE paging.
        """
        self.need("KVM_CAP_SREGS2")
        call(self, "KVM_SET_SREGS2", pointer(sregs2, "struct kvm_sregs2 *"))

    def get_fpu(self) -> Any:
        """KVM_GET_FPU (api.rst 4.22): x87 and SSE registers, a ``struct kvm_fpu *``."""
        return get(self, "KVM_GET_FPU", "struct kvm_fpu *")

    def set_fpu(self, fpu: Any) -> None:
        """KVM_SET_FPU (api.rst 4.23): write all of ``struct kvm_fpu``.

        It does not mark x87 and SSE as in use: as long as the guest has touched neither,
        :meth:`get_xsave` goes on to show their initial state.
        """
        call(self, "KVM_SET_FPU", pointer(fpu, "struct kvm_fpu *"))

    def get_xsave(self) -> Any:
        """KVM_GET_XSAVE (api.rst 4.42): the first 4096 bytes of the XSAVE area.

        Returns: ``struct kvm_xsave *``; CPUID leaf 0xd says what lies where in ``region``. Needs
        KVM_CAP_XSAVE.

        Errors: EINVAL if the guest's state is larger (KVM_CAP_XSAVE2 > 4096): use
        :meth:`get_xsave2`.
        """
        self.need("KVM_CAP_XSAVE")
        return get(self, "KVM_GET_XSAVE", "struct kvm_xsave *")

    def get_xsave2(self) -> Any:
        """KVM_GET_XSAVE2 (api.rst 4.134): the whole XSAVE area.

        Returns: ``struct kvm_xsave *`` with ``extra`` behind ``region``; ``ffi.sizeof(x[0])`` is
        the size that KVM_CAP_XSAVE2 gives. Needs KVM_CAP_XSAVE2.
        """
        self.need("KVM_CAP_XSAVE2")
        xsave = ffi.new("struct kvm_xsave *", {"extra": (self._xsave_size() - 4096 + 3) // 4})
        call(self, "KVM_GET_XSAVE2", xsave)
        return xsave

    def set_xsave(self, xsave: Any) -> None:
        """KVM_SET_XSAVE (api.rst 4.43): write the XSAVE area.

        Args:
            xsave: from :meth:`get_xsave` or :meth:`get_xsave2`.

        Needs KVM_CAP_XSAVE.

        Errors: EINVAL for a component or an MXCSR bit that host or guest lacks;
        :class:`ValueError` if it is shorter than KVM_CAP_XSAVE2, which KVM reads.
        """
        self.need("KVM_CAP_XSAVE")
        xsave = pointer(xsave, "struct kvm_xsave *")
        size, wanted = ffi.sizeof(xsave[0]), self._xsave_size()
        if size < wanted:
            raise ValueError(
                f"KVM_SET_XSAVE: KVM reads {wanted} bytes (KVM_CAP_XSAVE2), these are {size}: "
                "use what get_xsave2() returned"
            )
        call(self, "KVM_SET_XSAVE", xsave)

    def _xsave_size(self) -> int:
        """Bytes of the XSAVE area: not remembered, arch_prctl() may enlarge it."""
        return max(4096, self.vm.check_extension("KVM_CAP_XSAVE2"))

    def get_xcrs(self) -> Any:
        """KVM_GET_XCRS (api.rst 4.44): XCR0, as ``xcrs[0 .. nr_xcrs-1]`` of a struct kvm_xcrs *.

        Needs KVM_CAP_XCRS.
        """
        self.need("KVM_CAP_XCRS")
        return get(self, "KVM_GET_XCRS", "struct kvm_xcrs *")

    def set_xcrs(self, xcrs: Any) -> None:
        """KVM_SET_XCRS (api.rst 4.45): write ``struct kvm_xcrs``.

        Needs KVM_CAP_XCRS. Errors: EINVAL for an XCR0 that CPUID leaf 0xd does not allow.
        """
        self.need("KVM_CAP_XCRS")
        call(self, "KVM_SET_XCRS", pointer(xcrs, "struct kvm_xcrs *"))

    def get_lapic(self) -> Any:
        """KVM_GET_LAPIC (api.rst 4.57): the local APIC's registers.

        Returns: ``struct kvm_lapic_state *``, 1024 bytes laid out as the APIC's page. Needs
        KVM_CAP_IRQCHIP. Errors: EINVAL without an in-kernel irqchip.
        """
        self.need("KVM_CAP_IRQCHIP")
        return get(self, "KVM_GET_LAPIC", "struct kvm_lapic_state *")

    def set_lapic(self, lapic: Any) -> None:
        """KVM_SET_LAPIC (api.rst 4.58): write the local APIC's registers.

        Args:
            lapic: ``struct kvm_lapic_state``; its APIC ID must be the vCPU's.

        Needs KVM_CAP_IRQCHIP. Errors: EINVAL without an in-kernel irqchip, or for another ID.
        """
        self.need("KVM_CAP_IRQCHIP")
        call(self, "KVM_SET_LAPIC", pointer(lapic, "struct kvm_lapic_state *"))

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE (api.rst 4.38): ``KVM_MP_STATE_*``: runnable, halted, waiting for SIPI.

        Without an in-kernel irqchip it is always KVM_MP_STATE_RUNNABLE. Needs KVM_CAP_MP_STATE.
        """
        self.need("KVM_CAP_MP_STATE")
        return int(get(self, "KVM_GET_MP_STATE", "struct kvm_mp_state *").mp_state)

    def set_mp_state(self, mp_state: int) -> None:
        """KVM_SET_MP_STATE (api.rst 4.39): make the vCPU runnable, halted, or waiting.

        Needs KVM_CAP_MP_STATE. Errors: EINVAL without an in-kernel irqchip for anything but
        KVM_MP_STATE_RUNNABLE.
        """
        self.need("KVM_CAP_MP_STATE")
        call(self, "KVM_SET_MP_STATE", ffi.new("struct kvm_mp_state *", {"mp_state": mp_state}))

    def get_vcpu_events(self) -> Any:
        """KVM_GET_VCPU_EVENTS (api.rst 4.31): pending exceptions, interrupts, NMIs and SMIs.

        Returns: ``struct kvm_vcpu_events *``. Needs KVM_CAP_VCPU_EVENTS.
        """
        self.need("KVM_CAP_VCPU_EVENTS")
        return get(self, "KVM_GET_VCPU_EVENTS", "struct kvm_vcpu_events *")

    def set_vcpu_events(self, events: Any) -> None:
        """KVM_SET_VCPU_EVENTS (api.rst 4.32): write ``struct kvm_vcpu_events``.

        Its ``flags`` (KVM_VCPUEVENT_VALID_*) say which optional parts count. Needs
        KVM_CAP_VCPU_EVENTS. Errors: EINVAL for a flag this KVM lacks or has not enabled, or an
        exception that does not exist.
        """
        self.need("KVM_CAP_VCPU_EVENTS")
        call(self, "KVM_SET_VCPU_EVENTS", pointer(events, "struct kvm_vcpu_events *"))

    def get_debugregs(self) -> Any:
        """KVM_GET_DEBUGREGS (api.rst 4.33): the guest's DR0-DR3, DR6, DR7.

        Returns: ``struct kvm_debugregs *``. Needs KVM_CAP_DEBUGREGS.
        """
        self.need("KVM_CAP_DEBUGREGS")
        return get(self, "KVM_GET_DEBUGREGS", "struct kvm_debugregs *")

    def set_debugregs(self, debugregs: Any) -> None:
        """KVM_SET_DEBUGREGS (api.rst 4.34): write ``struct kvm_debugregs``.

        Needs KVM_CAP_DEBUGREGS. Errors: EINVAL for flags, or reserved bits in DR6 or DR7.
        """
        self.need("KVM_CAP_DEBUGREGS")
        call(self, "KVM_SET_DEBUGREGS", pointer(debugregs, "struct kvm_debugregs *"))

    def get_nested_state(self) -> Any:
        """KVM_GET_NESTED_STATE (api.rst 4.114): what the guest's own hypervisor is doing.

        Returns: ``struct kvm_nested_state *`` with ``size`` bytes behind the pointer, its header
        included; ``ffi.buffer(state, state.size)`` is all of it. Needs KVM_CAP_NESTED_STATE.
        """
        size = max(self.need("KVM_CAP_NESTED_STATE"), NESTED_STATE_HEADER)
        while True:
            state = ffi.from_buffer("struct kvm_nested_state *", bytearray(size))
            state.size = size
            try:
                call(self, "KVM_GET_NESTED_STATE", state)
            except KvmError as error:
                if error.errno != errno.E2BIG or not size < state.size <= 1 << 24:
                    raise
                size = state.size  # KVM says what it wants
                continue
            return state

    def set_nested_state(self, state: Any) -> None:
        """KVM_SET_NESTED_STATE (api.rst 4.115): write what :meth:`get_nested_state` returned.

        Args:
            state: ``struct kvm_nested_state *``, or its bytes.

        Needs KVM_CAP_NESTED_STATE.

        Errors: EINVAL for a format of the other vendor, or a guest without VMX or SVM in its
        CPUID; :class:`ValueError` for bytes shorter than their ``size``.
        """
        self.need("KVM_CAP_NESTED_STATE")
        if not isinstance(state, ffi.CData):
            state = _nested_state(state)
        call(self, "KVM_SET_NESTED_STATE", pointer(state, "struct kvm_nested_state *"))


def _nested_state(data: BytesLike) -> Any:
    copy = bytearray(data)
    if len(copy) < NESTED_STATE_HEADER:
        raise ValueError(
            f"a nested state has at least {NESTED_STATE_HEADER} bytes, not {len(copy)}"
        )
    state = ffi.from_buffer("struct kvm_nested_state *", copy)
    if state.size > len(copy):
        raise ValueError(f"this nested state has {len(copy)} of its {state.size} bytes")
    return state
