"""The classes of exits; :mod:`pykvm.kvm.exits` is the module to import them from."""

from __future__ import annotations

from pykvm._abi import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar


class Exit:
    """An exit. Compares by type and values; ``match`` takes them in the order of its repr."""

    __slots__ = ()
    __match_args__: ClassVar[tuple[str, ...]] = ()

    #: ``KVM_EXIT_*``, the number.
    reason: ClassVar[int] = -1
    #: ``KVM_EXIT_*``, the name.
    name: ClassVar[str] = ""

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.__match_args__)

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash((type(self), self._values()))

    def __repr__(self) -> str:
        fields = ", ".join(
            f"{name}={_show(name, value)}"
            for name, value in zip(self.__match_args__, self._values(), strict=True)
        )
        return f"{type(self).__name__}({fields})"


#: Fields that are counts, sizes or flags of yes and no; other numbers print in hex.
_DECIMAL = frozenset(("size", "count", "is_write", "cpu", "nr", "longmode", "suberror", "ndata"))


def _show(slot: str, value: Any) -> str:
    if isinstance(value, bytes):
        return repr(value) if len(value) <= 32 else f"{value[:32]!r}… ({len(value)} bytes)"
    if isinstance(value, bool) or slot in _DECIMAL or not isinstance(value, int | tuple):
        return repr(value)
    if isinstance(value, tuple):
        return "(" + ", ".join(hex(item) for item in value) + ")"
    return hex(value)


class IoExit(Exit):
    """KVM_EXIT_IO: the guest executed IN, OUT, INS or OUTS.

    Attributes:
        port: the port.
        size: bytes of one item: 1, 2 or 4.
        count: items. A REP INS asks for up to 1024 bytes at once; REP OUTS is one exit an item.
        is_write: OUT or OUTS.
        data: of a write, ``size * count`` bytes; of a read empty, the answer goes into the run
            page (``Vcpu.complete_io``).
    """

    __slots__ = ("count", "data", "is_write", "port", "size")
    __match_args__ = ("port", "size", "count", "is_write", "data")
    reason = lib.KVM_EXIT_IO
    name = "KVM_EXIT_IO"

    def __init__(self, port: int, size: int, count: int, is_write: bool, data: bytes) -> None:
        self.port = port
        self.size = size
        self.count = count
        self.is_write = is_write
        self.data = data

    @property
    def value(self) -> int:
        """What a single item writes, as a number; 0 for a read."""
        if self.count != 1:
            raise ValueError(f"this exit has {self.count} items: see .items")
        return int.from_bytes(self.data, "little")

    @property
    def items(self) -> list[int]:
        """What each item writes, as numbers, in the order they were written."""
        size, data = self.size, self.data
        return [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]


class MmioExit(Exit):
    """KVM_EXIT_MMIO: the guest touched guest-physical addresses that no slot holds.

    Also a write into a read-only slot. An access that KVM had to split (misaligned across a page,
    or wider than 8 bytes) makes several exits.

    Attributes:
        phys_addr: the guest-physical address.
        size: 1 to 8 bytes, odd numbers as well.
        is_write: whether it writes.
        data: of a write, ``size`` bytes; of a read empty (``Vcpu.complete_mmio`` answers).
    """

    __slots__ = ("data", "is_write", "phys_addr", "size")
    __match_args__ = ("phys_addr", "size", "is_write", "data")
    reason = lib.KVM_EXIT_MMIO
    name = "KVM_EXIT_MMIO"

    def __init__(self, phys_addr: int, size: int, is_write: bool, data: bytes) -> None:
        self.phys_addr = phys_addr
        self.size = size
        self.is_write = is_write
        self.data = data

    @property
    def value(self) -> int:
        """What it writes, as a little-endian number; 0 for a read."""
        return int.from_bytes(self.data, "little")


class PlainExit(Exit):
    """An exit that says no more than its name."""

    __slots__ = ()

    def __init__(self) -> None:
        pass


class HltExit(PlainExit):
    """KVM_EXIT_HLT: the guest executed HLT. With an in-kernel irqchip it does not exit."""

    __slots__ = ()
    reason = lib.KVM_EXIT_HLT
    name = "KVM_EXIT_HLT"


class ShutdownExit(PlainExit):
    """KVM_EXIT_SHUTDOWN: a triple fault, or on AMD a shutdown intercept. Running on repeats it."""

    __slots__ = ()
    reason = lib.KVM_EXIT_SHUTDOWN
    name = "KVM_EXIT_SHUTDOWN"


class IrqWindowOpenExit(PlainExit):
    """KVM_EXIT_IRQ_WINDOW_OPEN: an interrupt can be injected, as request_interrupt_window asked."""

    __slots__ = ()
    reason = lib.KVM_EXIT_IRQ_WINDOW_OPEN
    name = "KVM_EXIT_IRQ_WINDOW_OPEN"


class IntrExit(PlainExit):
    """KVM_EXIT_INTR: a signal is pending, or immediate_exit was set (KVM_RUN said EINTR)."""

    __slots__ = ()
    reason = lib.KVM_EXIT_INTR
    name = "KVM_EXIT_INTR"


class SetTprExit(PlainExit):
    """KVM_EXIT_SET_TPR: the guest lowered its task priority (CR8); the APIC is in userspace."""

    __slots__ = ()
    reason = lib.KVM_EXIT_SET_TPR
    name = "KVM_EXIT_SET_TPR"


class NmiExit(PlainExit):
    """KVM_EXIT_NMI: an NMI arrived for the host while the guest ran."""

    __slots__ = ()
    reason = lib.KVM_EXIT_NMI
    name = "KVM_EXIT_NMI"


class DirtyRingFullExit(PlainExit):
    """KVM_EXIT_DIRTY_RING_FULL: harvest the dirty ring and reset it, then run on."""

    __slots__ = ()
    reason = lib.KVM_EXIT_DIRTY_RING_FULL
    name = "KVM_EXIT_DIRTY_RING_FULL"


class BusLockExit(PlainExit):
    """KVM_EXIT_X86_BUS_LOCK: the guest took a bus lock (KVM_CAP_X86_BUS_LOCK_EXIT)."""

    __slots__ = ()
    reason = lib.KVM_EXIT_X86_BUS_LOCK
    name = "KVM_EXIT_X86_BUS_LOCK"


class ApResetHoldExit(PlainExit):
    """KVM_EXIT_AP_RESET_HOLD: an SEV-ES guest's processor parks until it gets a SIPI."""

    __slots__ = ()
    reason = lib.KVM_EXIT_AP_RESET_HOLD
    name = "KVM_EXIT_AP_RESET_HOLD"


class ExceptionExit(Exit):
    """KVM_EXIT_EXCEPTION: an exception that KVM neither delivers nor understands.

    Attributes:
        exception: its vector.
        error_code: its error code.
    """

    __slots__ = ("error_code", "exception")
    __match_args__ = ("exception", "error_code")
    reason = lib.KVM_EXIT_EXCEPTION
    name = "KVM_EXIT_EXCEPTION"

    def __init__(self, exception: int, error_code: int) -> None:
        self.exception = exception
        self.error_code = error_code


class FailEntryExit(Exit):
    """KVM_EXIT_FAIL_ENTRY: the processor refused to enter the guest. Running on repeats it.

    Attributes:
        hardware_entry_failure_reason: VMX: the exit reason, 0x80000021 for invalid guest state;
            SVM: the exit code, 0xffffffffffffffff (VMEXIT_INVALID).
        cpu: the host processor it was tried on.
    """

    __slots__ = ("cpu", "hardware_entry_failure_reason")
    __match_args__ = ("hardware_entry_failure_reason", "cpu")
    reason = lib.KVM_EXIT_FAIL_ENTRY
    name = "KVM_EXIT_FAIL_ENTRY"

    def __init__(self, hardware_entry_failure_reason: int, cpu: int) -> None:
        self.hardware_entry_failure_reason = hardware_entry_failure_reason
        self.cpu = cpu


class InternalErrorExit(Exit):
    """KVM_EXIT_INTERNAL_ERROR: KVM cannot go on, mostly as it cannot emulate an instruction.

    Attributes:
        suberror: ``KVM_INTERNAL_ERROR_*``: 1 EMULATION, 2 SIMUL_EX, 3 DELIVERY_EV,
            4 UNEXPECTED_EXIT_REASON.
        data: what KVM tells beyond it, up to 16 words; their meaning is the suberror's.
        flags: of EMULATION, which optional parts are there (word 0 of data); else 0.
        insn_bytes: of EMULATION, the instruction bytes that KVM fetched, or b"".
    """

    __slots__ = ("data", "flags", "insn_bytes", "suberror")
    __match_args__ = ("suberror", "data", "flags", "insn_bytes")
    reason = lib.KVM_EXIT_INTERNAL_ERROR
    name = "KVM_EXIT_INTERNAL_ERROR"

    def __init__(
        self, suberror: int, data: tuple[int, ...] = (), flags: int = 0, insn_bytes: bytes = b""
    ) -> None:
        self.suberror = suberror
        self.data = data
        self.flags = flags
        self.insn_bytes = insn_bytes


class MsrExit(Exit):
    """An MSR access that KVM hands out (KVM_CAP_X86_USER_SPACE_MSR).

    Attributes:
        index: the MSR.
        data: what WRMSR writes; of RDMSR 0 (``Vcpu.complete_msr`` answers either).
        msr_reason: KVM_MSR_EXIT_REASON_*: 1 INVAL, 2 UNKNOWN, 4 FILTER.
    """

    __slots__ = ("data", "index", "msr_reason")
    __match_args__ = ("index", "data", "msr_reason")
    is_write: ClassVar[bool]

    def __init__(self, index: int, data: int, msr_reason: int) -> None:
        self.index = index
        self.data = data
        self.msr_reason = msr_reason


class RdmsrExit(MsrExit):
    """KVM_EXIT_X86_RDMSR: the guest reads an MSR; see the attributes of :class:`WrmsrExit`."""

    __slots__ = ()
    reason = lib.KVM_EXIT_X86_RDMSR
    name = "KVM_EXIT_X86_RDMSR"
    is_write = False


class WrmsrExit(MsrExit):
    """KVM_EXIT_X86_WRMSR: the guest writes an MSR (``index``, ``data``, ``msr_reason``)."""

    __slots__ = ()
    reason = lib.KVM_EXIT_X86_WRMSR
    name = "KVM_EXIT_X86_WRMSR"
    is_write = True


class HypercallExit(Exit):
    """KVM_EXIT_HYPERCALL: a hypercall that KVM hands out (KVM_CAP_EXIT_HYPERCALL).

    Attributes:
        nr: its number (KVM_HC_MAP_GPA_RANGE is 12).
        args: its six arguments.
        longmode: whether the guest is in 64-bit mode.
        flags: the same word in newer kernels, ``KVM_EXIT_HYPERCALL_*``.
    """

    __slots__ = ("args", "flags", "longmode", "nr")
    __match_args__ = ("nr", "args", "flags")
    reason = lib.KVM_EXIT_HYPERCALL
    name = "KVM_EXIT_HYPERCALL"

    def __init__(self, nr: int, args: tuple[int, ...], flags: int) -> None:
        self.nr = nr
        self.args = args
        self.flags = flags
        self.longmode = bool(flags & 1)


class DebugExit(Exit):
    """KVM_EXIT_DEBUG: a breakpoint or a single step (``Vcpu.set_guest_debug``).

    Attributes:
        exception: 1 (#DB) or 3 (#BP).
        pc: linear address of the instruction: CS base + RIP.
        dr6: why, as the processor's DR6 says it.
        dr7: the DR7 in force.
    """

    __slots__ = ("dr6", "dr7", "exception", "pc")
    __match_args__ = ("exception", "pc", "dr6", "dr7")
    reason = lib.KVM_EXIT_DEBUG
    name = "KVM_EXIT_DEBUG"

    def __init__(self, exception: int, pc: int, dr6: int, dr7: int) -> None:
        self.exception = exception
        self.pc = pc
        self.dr6 = dr6
        self.dr7 = dr7


class SystemEventExit(Exit):
    """KVM_EXIT_SYSTEM_EVENT: the guest asked for shutdown, reset, or crashed.

    Attributes:
        type: ``KVM_SYSTEM_EVENT_*``.
        data: what belongs to it, up to 16 words.
    """

    __slots__ = ("data", "type")
    __match_args__ = ("type", "data")
    reason = lib.KVM_EXIT_SYSTEM_EVENT
    name = "KVM_EXIT_SYSTEM_EVENT"

    def __init__(self, type: int, data: tuple[int, ...]) -> None:
        self.type = type
        self.data = data


class IoapicEoiExit(Exit):
    """KVM_EXIT_IOAPIC_EOI: end of a level-triggered interrupt, to a userspace IOAPIC.

    Attributes:
        vector: the interrupt's vector.
    """

    __slots__ = ("vector",)
    __match_args__ = ("vector",)
    reason = lib.KVM_EXIT_IOAPIC_EOI
    name = "KVM_EXIT_IOAPIC_EOI"

    def __init__(self, vector: int) -> None:
        self.vector = vector


class HypervExit(Exit):
    """KVM_EXIT_HYPERV: something of Hyper-V that KVM hands out.

    Attributes:
        type: KVM_EXIT_HYPERV_SYNIC, KVM_EXIT_HYPERV_HCALL or KVM_EXIT_HYPERV_SYNDBG.
        fields: its members by the kernel's names.
    """

    __slots__ = ("fields", "type")
    __match_args__ = ("type", "fields")
    reason = lib.KVM_EXIT_HYPERV
    name = "KVM_EXIT_HYPERV"

    def __init__(self, type: int, fields: dict[str, Any]) -> None:
        self.type = type
        self.fields = fields

    def __hash__(self) -> int:
        return hash((self.type, tuple(self.fields.items())))


class TprAccessExit(Exit):
    """KVM_EXIT_TPR_ACCESS: the guest touched its task priority (``tpr_access_reporting``).

    Attributes:
        rip: of the instruction.
        is_write: whether it writes.
    """

    __slots__ = ("is_write", "rip")
    __match_args__ = ("rip", "is_write")
    reason = lib.KVM_EXIT_TPR_ACCESS
    name = "KVM_EXIT_TPR_ACCESS"

    def __init__(self, rip: int, is_write: bool) -> None:
        self.rip = rip
        self.is_write = is_write


class NotifyExit(Exit):
    """KVM_EXIT_NOTIFY: the guest held off interrupts too long (KVM_CAP_X86_NOTIFY_VMEXIT).

    Attributes:
        flags: KVM_NOTIFY_CONTEXT_INVALID: the guest's context is lost, it cannot run on.
    """

    __slots__ = ("flags",)
    __match_args__ = ("flags",)
    reason = lib.KVM_EXIT_NOTIFY
    name = "KVM_EXIT_NOTIFY"

    def __init__(self, flags: int) -> None:
        self.flags = flags


class MemoryFaultExit(Exit):
    """KVM_EXIT_MEMORY_FAULT: KVM could not get at guest memory, and says where.

    KVM_RUN fails with EFAULT (or EHWPOISON) at the same time.

    Attributes:
        flags: KVM_MEMORY_EXIT_FLAG_PRIVATE: the access was to private memory.
        gpa: first guest-physical address.
        size: bytes.
        errno: what KVM_RUN failed with, 0 if it did not.
    """

    __slots__ = ("errno", "flags", "gpa", "size")
    __match_args__ = ("flags", "gpa", "size", "errno")
    reason = lib.KVM_EXIT_MEMORY_FAULT
    name = "KVM_EXIT_MEMORY_FAULT"

    def __init__(self, flags: int, gpa: int, size: int, errno: int = 0) -> None:
        self.flags = flags
        self.gpa = gpa
        self.size = size
        self.errno = errno


class UnknownExit(Exit):
    """An exit this module does not know, or KVM_EXIT_UNKNOWN: nothing of it is lost.

    Attributes:
        reason: the number.
        name: the header's name of it, or "".
        data: the 256 bytes of the run page's union.
    """

    __slots__ = ("data", "name", "reason")
    __match_args__ = ("reason", "data")

    def __init__(self, reason: int, data: bytes) -> None:
        self.reason = reason  # type: ignore[misc]
        self.name = _names().get(reason, "")  # type: ignore[misc]
        self.data = data

    @property
    def hardware_exit_reason(self) -> int:
        """Of KVM_EXIT_UNKNOWN: the processor's exit reason that KVM does not know."""
        return int.from_bytes(self.data[:8], "little")

    def __repr__(self) -> str:
        data = _show("data", self.data)
        return f"UnknownExit(reason={self.reason}, name={self.name!r}, data={data})"


def _names() -> dict[int, str]:
    # KVM_EXIT_IO_IN, KVM_EXIT_HYPERV_SYNIC and the like are members of their exits, not reasons.
    members = ("KVM_EXIT_IO_", "KVM_EXIT_HYPERV_", "KVM_EXIT_XEN_HCALL", "KVM_EXIT_HYPERCALL_")
    return {
        getattr(lib, name): name
        for name in dir(lib)
        if name.startswith("KVM_EXIT_") and not name.startswith(members)
    }
