"""Why KVM_RUN returned: one class for each KVM_EXIT_* of x86 (api.rst chapter 5).

Every value is copied out of the run page, so an exit that is kept stays what it was. ``reason`` is
the number, ``name`` the kernel's name of it. What this module does not know becomes an
:class:`UnknownExit` with its bytes.
"""

from __future__ import annotations

import errno

from pykvm._abi import ffi, lib

from .exit_types import (
    ApResetHoldExit,
    BusLockExit,
    DebugExit,
    DirtyRingFullExit,
    ExceptionExit,
    Exit,
    FailEntryExit,
    HltExit,
    HypercallExit,
    HypervExit,
    InternalErrorExit,
    IntrExit,
    IoapicEoiExit,
    IoExit,
    IrqWindowOpenExit,
    MemoryFaultExit,
    MmioExit,
    MsrExit,
    NmiExit,
    NotifyExit,
    PlainExit,
    RdmsrExit,
    SetTprExit,
    ShutdownExit,
    SystemEventExit,
    TprAccessExit,
    UnknownExit,
    WrmsrExit,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = [
    "ApResetHoldExit",
    "BusLockExit",
    "DebugExit",
    "DirtyRingFullExit",
    "ExceptionExit",
    "Exit",
    "FailEntryExit",
    "HltExit",
    "HypercallExit",
    "HypervExit",
    "InternalErrorExit",
    "IntrExit",
    "IoExit",
    "IoapicEoiExit",
    "IrqWindowOpenExit",
    "MemoryFaultExit",
    "MmioExit",
    "MsrExit",
    "NmiExit",
    "NotifyExit",
    "PlainExit",
    "RdmsrExit",
    "SetTprExit",
    "ShutdownExit",
    "SystemEventExit",
    "TprAccessExit",
    "UnknownExit",
    "WrmsrExit",
    "decode",
    "decode_failed",
]

_EHWPOISON = 133  # include/uapi/asm-generic/errno.h; Python's errno has no name for it


def _io(run: Any) -> Exit:
    io = run.io
    size, count = io.size, io.count
    if io.direction == lib.KVM_EXIT_IO_IN:
        return IoExit(io.port, size, count, False, b"")
    data = ffi.unpack(ffi.cast("char *", run) + io.data_offset, size * count)
    return IoExit(io.port, size, count, True, data)


def _mmio(run: Any) -> Exit:
    mmio = run.mmio
    size = mmio.len
    if mmio.is_write:
        return MmioExit(mmio.phys_addr, size, True, bytes(mmio.data[0 : min(size, 8)]))
    return MmioExit(mmio.phys_addr, size, False, b"")


def _internal(run: Any) -> Exit:
    internal = run.internal
    data = tuple(internal.data[0 : min(internal.ndata, 16)])
    if internal.suberror != lib.KVM_INTERNAL_ERROR_EMULATION or not data:
        return InternalErrorExit(internal.suberror, data)
    flags, insn_bytes = data[0], b""
    if flags & lib.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES and len(data) >= 3:
        # A byte of length, then up to 15 of code: words 1 and 2.
        code = data[1].to_bytes(8, "little") + data[2].to_bytes(8, "little")
        insn_bytes = code[1 : 1 + min(code[0], 15)]
    return InternalErrorExit(internal.suberror, data, flags, insn_bytes)


def _hypercall(run: Any) -> Exit:
    call = _overlay(run, "hypercall")
    # Older kernels write 32 bits of flags ("longmode") and leave the other 32 as they were.
    return HypercallExit(call.nr, tuple(call.args), call.longmode)


def _debug(run: Any) -> Exit:
    arch = run.debug.arch
    return DebugExit(arch.exception, arch.pc, arch.dr6, arch.dr7)


def _system_event(run: Any) -> Exit:
    event = _overlay(run, "system_event")
    return SystemEventExit(event.type, tuple(event.data[0 : min(event.ndata, 16)]))


def _hyperv(run: Any) -> Exit:
    hyperv = run.hyperv
    part = {
        lib.KVM_EXIT_HYPERV_SYNIC: "synic",
        lib.KVM_EXIT_HYPERV_HCALL: "hcall",
        lib.KVM_EXIT_HYPERV_SYNDBG: "syndbg",
    }.get(hyperv.type)
    if part is None:
        return UnknownExit(HypervExit.reason, _union(run))
    struct = getattr(hyperv.u, part)
    fields: dict[str, Any] = {}
    for name, _ in ffi.typeof(struct).fields:
        if not name.startswith("pad"):
            value = getattr(struct, name)
            fields[name] = value if isinstance(value, int) else tuple(value)
    return HypervExit(hyperv.type, fields)


def _memory_fault(run: Any, errno: int = 0) -> MemoryFaultExit:
    fault = _overlay(run, "memory_fault")
    return MemoryFaultExit(fault.flags, fault.gpa, fault.size, errno)


def _overlay(run: Any, member: str) -> Any:
    """A member of the run page's union that the header it was built against may be too old for."""
    return ffi.cast(f"struct pykvm_run_{member} *", ffi.addressof(run, "hw"))


def _union(run: Any) -> bytes:
    return bytes(ffi.buffer(run.padding))


def _plain(kind: type[PlainExit]) -> Callable[[Any], Exit]:
    return lambda run: kind()


_DECODERS: dict[int, Callable[[Any], Exit]] = {
    IoExit.reason: _io,
    MmioExit.reason: _mmio,
    ExceptionExit.reason: lambda run: ExceptionExit(run.ex.exception, run.ex.error_code),
    FailEntryExit.reason: lambda run: FailEntryExit(
        run.fail_entry.hardware_entry_failure_reason, run.fail_entry.cpu
    ),
    InternalErrorExit.reason: _internal,
    RdmsrExit.reason: lambda run: RdmsrExit(run.msr.index, 0, run.msr.reason),
    WrmsrExit.reason: lambda run: WrmsrExit(run.msr.index, run.msr.data, run.msr.reason),
    HypercallExit.reason: _hypercall,
    DebugExit.reason: _debug,
    SystemEventExit.reason: _system_event,
    IoapicEoiExit.reason: lambda run: IoapicEoiExit(run.eoi.vector),
    HypervExit.reason: _hyperv,
    TprAccessExit.reason: lambda run: TprAccessExit(
        run.tpr_access.rip, bool(run.tpr_access.is_write)
    ),
    NotifyExit.reason: lambda run: NotifyExit(_overlay(run, "notify").flags),
    MemoryFaultExit.reason: _memory_fault,
    **{
        kind.reason: _plain(kind)
        for kind in (
            HltExit,
            ShutdownExit,
            IrqWindowOpenExit,
            IntrExit,
            SetTprExit,
            NmiExit,
            DirtyRingFullExit,
            BusLockExit,
            ApResetHoldExit,
        )
    },
}


def decode(run: Any) -> Exit:
    """The exit that a ``struct kvm_run *`` holds after a KVM_RUN that succeeded."""
    decoder = _DECODERS.get(run.exit_reason)
    return UnknownExit(run.exit_reason, _union(run)) if decoder is None else decoder(run)


def decode_failed(run: Any, error: int) -> Exit | None:
    """The exit behind a KVM_RUN that failed with errno ``error``; None if it is no exit.

    EINTR is an exit for a signal. EFAULT and EHWPOISON are one if KVM says where the fault was.
    """
    if error == errno.EINTR:
        return IntrExit()
    if error in (errno.EFAULT, _EHWPOISON) and run.exit_reason == MemoryFaultExit.reason:
        return _memory_fault(run, error)
    return None
