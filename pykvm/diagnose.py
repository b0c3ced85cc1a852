"""From an exit that ends a vCPU to an exception that explains it; loaded only when there is one."""

from __future__ import annotations

from pykvm import kvm
from pykvm import result as reasons
from pykvm.errors import PykvmError, RunError, VcpuExitError

_SUBERRORS = {
    kvm.KVM_INTERNAL_ERROR_EMULATION: "KVM_INTERNAL_ERROR_EMULATION",
    kvm.KVM_INTERNAL_ERROR_SIMUL_EX: "KVM_INTERNAL_ERROR_SIMUL_EX",
    kvm.KVM_INTERNAL_ERROR_DELIVERY_EV: "KVM_INTERNAL_ERROR_DELIVERY_EV",
    kvm.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: "KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON",
}

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.cpu import Cpu
    from pykvm.result import RunResult


def refused(cpu: Cpu, ioctl: str) -> VcpuExitError:
    """KVM refused the segment and control registers of ``cpu`` (EINVAL)."""
    from pykvm.arch.x86_64 import explain

    return VcpuExitError(
        str(explain.explain_refused(cpu.load_sregs(), **_context(cpu), ioctl=ioctl))
    )


def explain(cpu: Cpu, reason: str, exit: Any, advice: str = "") -> VcpuExitError:
    """Failed entry, internal error or shutdown of ``cpu``, with registers, code and cause.

    ``advice`` goes first.
    """
    from pykvm.arch.x86_64 import explain as arch

    if reason == reasons.FAILED_ENTRY and exit is None:
        return refused(cpu, "KVM_SET_SREGS")
    sregs, context = cpu.load_sregs(), _context(cpu)
    if reason == reasons.FAILED_ENTRY:
        text = arch.explain_fail_entry(exit.hardware_entry_failure_reason, sregs=sregs, **context)
    elif reason == reasons.INTERNAL_ERROR:
        text = arch.explain_internal_error(
            _SUBERRORS.get(exit.suberror, f"suberror {exit.suberror}"),
            sregs=sregs,
            data=exit.data,
            insn=exit.insn_bytes or None,
            **context,
        )
    else:
        text = arch.explain_shutdown(sregs=sregs, **context)
    return VcpuExitError(f"{advice}\n{text}".lstrip(), exit)


def incomplete(result: RunResult) -> PykvmError | None:
    """What ``check()`` raises for a run that was cut short, or ended by a failing guest."""
    if result.ok or result.reason == reasons.INTERRUPTED:
        return None
    text = str(result)
    if result.reason == reasons.UNCLAIMED:
        text += "\nclaim it: on_pio() or on_mmio(), or an action of m.pio and m.mmio"
    elif result.reason == reasons.TIMEOUT and any(s.halted for s in result.cpus):
        asleep = [s.index for s in result.cpus if s.halted and not s.interrupts]
        if asleep:
            text += f"\ncpu {asleep[0]} executed HLT with interrupts off: it never wakes"
    if result.advice:
        text += f"\n{result.advice}"
    return RunError(text, result)


def _context(cpu: Cpu) -> dict[str, Any]:
    return {"regs": cpu.load_regs(), "memory": cpu.memory, **cpu.offers()}
