"""From an exit that ends a vCPU to an exception that explains it; loaded only when there is one."""

from __future__ import annotations

from pykvm import kvm
from pykvm import result as reasons
from pykvm.cpu import REGS, SREGS
from pykvm.errors import PykvmError, ReplayError, RunError, VcpuExitError

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
    known = _known(cpu)
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
        text = arch.explain_shutdown(sregs=sregs, known=known, **context)
    return VcpuExitError(f"{advice}\n{text}".lstrip(), exit)


def incomplete(result: RunResult, cpu: Cpu) -> PykvmError | None:
    """What ``check()`` raises for a run that was cut short, or ended by a failing guest.

    ``cpu`` is the vCPU that ended it.
    """
    if result.ok or result.reason == reasons.INTERRUPTED:
        return None
    if result.reason == reasons.DIVERGED:
        return ReplayError(str(result.exit))
    text = str(result)
    if result.reason == reasons.UNCLAIMED:
        text += _unclaimed(result.exit, cpu)
    elif result.reason == reasons.TIMEOUT:
        asleep = [s.index for s in result.cpus if s.halted and not s.interrupts]
        if asleep:
            text += f"\ncpu {asleep[0]} executed HLT with interrupts off: it never wakes"
        for state in result.cpus:
            if state.code and not any(state.code) and not (state.halted or state.waiting):
                text += (
                    f"\ncpu {state.index} executes zeros (00 00 is ADD [RAX],AL): nothing was "
                    "loaded there, or the guest ran past the end of its code"
                )
    if result.advice:
        text += f"\n{result.advice}"
    return RunError(text, result)


def _unclaimed(access: Any, cpu: Cpu) -> str:
    """Where the guest was, and what to do about a port or an address that nobody claimed."""
    where = f"\n  {cpu.state()!r}\n"
    if hasattr(access, "port"):
        return f"{where}claim the port: m.on_pio(), or an action of m.pio"
    ram = cpu.memory._map.describe(access.gpa)
    return f"{where}a wrong pointer ({ram}), or a device: m.on_mmio(), or an action of m.mmio"


def _known(cpu: Cpu) -> list[str]:
    """What is known of a vCPU whose registers its shutdown may have reset.

    The run page still has what was in it before, unless registers were read during the run: then
    KVM has stored the reset ones over them. To be called before registers are read.
    """
    page, runner = cpu._run, cpu._runner
    known = []
    if cpu._regs_at >= 0 and not page.kvm_valid_regs & REGS:
        ago = runner.c.entries - cpu._regs_at
        known.append(
            f"RIP was {page.s.regs.regs.rip:#x} and RSP {page.s.regs.regs.rsp:#x} when registers"
            f" were last set or read, {ago} {'entry' if ago == 1 else 'entries'} into the guest ago"
        )
    if cpu._sregs_at >= 0 and not page.kvm_valid_regs & SREGS and page.s.regs.sregs.cr0 & 1:
        idt = page.s.regs.sregs.idt
        if idt.limit < 7:
            known.append(
                "there was no IDT then: unless the guest has loaded one, any exception or interrupt"
                " is a triple fault"
            )
        else:
            known.append(f"the IDT was at {idt.base:#x} then, with limit {idt.limit:#x}")
    if runner.c.access.count:
        known.append(f"the last port or device that it used was {runner.access()!r}")
    return known


def _context(cpu: Cpu) -> dict[str, Any]:
    return {"regs": cpu.load_regs(), "memory": cpu.memory, **cpu.offers()}
