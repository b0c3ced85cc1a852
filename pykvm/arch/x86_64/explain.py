"""Why a vCPU stopped, in words: the registers judged, the code shown, the addresses walked.

Four functions for the four ways a state goes wrong, each returning an ``Explanation``:

- ``explain_refused``         KVM_SET_SREGS said EINVAL
- ``explain_fail_entry``      the processor refused to enter the guest (KVM_EXIT_FAIL_ENTRY)
- ``explain_internal_error``  KVM could not go on (KVM_EXIT_INTERNAL_ERROR)
- ``explain_shutdown``        a triple fault (KVM_EXIT_SHUTDOWN)

They take registers and memory as they are after the exit, and never raise for what those hold.
"""

from __future__ import annotations

from .exception_hints import exception_hints, idt_hints
from .instructions import family
from .regs import format_regs, format_sregs, mode_name
from .rules import VENDORS, Finding, check
from .rules_control import BY_CPUID
from .walk import peek, read_virtual, walk_sregs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from .walk import Walk

__all__ = [
    "Explanation",
    "check",
    "explain_fail_entry",
    "explain_internal_error",
    "explain_refused",
    "explain_shutdown",
]

CODE_BYTES = 16  # an instruction has at most 15


class Explanation:
    """What happened to a vCPU, and why.

    Attributes:
        what: the event, ``KVM_EXIT_SHUTDOWN: the guest triple-faulted``.
        hints: the likely causes and what to do, most telling first.
        findings: rules the registers break, see ``rules.check``.
        passed: findings about what only KVM could have refused, of a state that ran all the same.
        registers: both register files as text; "" if the general registers are not known.
        code: the bytes at CS:RIP, up to 16, as far as they can be read.
        instruction: the family of the instruction there, or "" for a plain one.
        walk: the translation of CS.base + RIP for a fetch; None without memory.
        stack_walk: the translation of the first push at SS:RSP; only after a shutdown.
    """

    __slots__ = (
        "code", "findings", "hints", "instruction", "passed", "registers", "stack_walk", "walk",
        "what",
    )  # fmt: skip

    def __init__(self, what: str, findings: list[Finding]) -> None:
        self.what, self.findings = what, findings
        self.passed: list[Finding] = []
        self.hints: list[str] = []
        self.registers = self.instruction = ""
        self.code = b""
        self.walk: Walk | None = None
        self.stack_walk: Walk | None = None

    @property
    def cause(self) -> str:
        """The likeliest cause in one line."""
        if self.hints:
            return self.hints[0]
        return str(self.findings[0]) if self.findings else "no cause found"

    def __str__(self) -> str:
        lines = [self.what]
        lines += [f"  - {hint}" for hint in self.hints]
        if self.findings:
            lines.append("the registers break these rules:")
            for finding in self.findings:
                lines.append(f"  - {finding}")
                lines.append(f"    enforced by {', '.join(VENDORS[n] for n in finding.vendors)}")
        for finding in self.passed:
            lines.append(f"this KVM lets pass, so it is hardly the cause: {finding.message}")
        if self.registers:
            lines.append(self.registers)
        if self.walk is not None:
            code = self.code.hex(" ") or "not readable"
            lines.append(f"code at CS:RIP: {code}{_in_words(self.instruction)}")
            lines.append(f"walk of RIP: {self.walk}")
        if self.stack_walk is not None:
            lines.append(f"walk of the stack: {self.stack_walk}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Explanation {self.what}; {self.cause}>"


def _in_words(instruction: str) -> str:
    return f"  ({instruction})" if instruction else ""


def _examine(
    what: str, sregs: Any, regs: Any, memory: Any, phys_bits: int, features: Iterable[str] | None,
    ran: bool = False,
) -> Explanation:  # fmt: skip
    """What every explanation has: findings, dumps, the code at RIP and its walk.

    Args:
        ran: the guest was in this state, so KVM did not refuse it; or the guest made it itself,
            and not every KVM stops a guest from what its CPUID does not offer.
    """
    rip, rflags = (None, None) if regs is None else (int(regs.rip), int(regs.rflags))
    features = None if features is None else frozenset(features)
    findings = check(sregs, rip, rflags, phys_bits=phys_bits, features=features)
    found = Explanation(what, findings)
    if ran:
        found.passed = [finding for finding in findings if finding.rule in BY_CPUID]
        found.findings = [finding for finding in findings if finding.rule not in BY_CPUID]
    found.registers = format_sregs(sregs)
    if regs is None or rip is None:
        return found
    found.registers = f"{format_regs(regs)}\n{found.registers}"
    if memory is None:
        return found
    linear = _linear(sregs, sregs.cs, rip)
    gigapages = features is None or "pdpe1gb" in features
    found.walk = walk_sregs(memory, sregs, linear, "x", phys_bits=phys_bits, gigapages=gigapages)
    found.code = read_virtual(memory, sregs, linear, CODE_BYTES)
    found.instruction = family(found.code, _code64(sregs))
    return found


def _code64(sregs: Any) -> bool:
    return bool(int(sregs.efer) >> 10 & 1 and int(sregs.cs.l))


def _linear(sregs: Any, segment: Any, offset: int) -> int:
    """Segment base + offset: bases do not count in 64-bit code, and 32 bits wrap elsewhere."""
    if _code64(sregs):
        return offset
    return int(segment.base) + offset & 0xFFFFFFFF


def _fetch_hints(found: Explanation, memory: Any) -> list[str]:
    """What is wrong with the place RIP points to, if anything."""
    walk = found.walk
    if walk is None:
        return []
    if walk.fault is not None:
        return [f"RIP cannot be fetched: {walk.fault}"]
    if walk.gpa is not None and peek(memory, walk.gpa, 1) is None:
        return [f"RIP leads to gpa {walk.gpa:#x}, which is not RAM: there is no code to run"]
    if found.code and not any(found.code):
        return ["the code at RIP is all zeros: was anything loaded there?"]
    return []


def explain_refused(
    sregs: Any, *, regs: Any = None, memory: Any = None, ioctl: str = "KVM_SET_SREGS",
    features: Iterable[str] | None = None, phys_bits: int = 52,
) -> Explanation:  # fmt: skip
    """KVM refused a register file with EINVAL.

    Args:
        sregs: what was to be set, not what KVM holds.
        ioctl: which call refused it.
        features, phys_bits: of the guest's CPUID, see ``rules.check``.
    """
    found = _examine(
        f"{ioctl} refused the registers (EINVAL)", sregs, regs, memory, phys_bits, features
    )
    # KVM's own checks first: they are what said no.
    found.findings.sort(key=lambda finding: "kvm" not in finding.vendors)
    if not any("kvm" in finding.vendors for finding in found.findings):
        found.hints.append(
            "no rule that KVM enforces is broken as far as is known here. It also refuses CR4 and "
            "EFER bits, an x2APIC base or a CR3 that the vCPU's CPUID does not allow: set CPUID "
            "before the registers"
        )
    return found


# VMX: basic exit reasons with bit 31 set, Intel SDM Vol. 3C §26.8 and appendix C.
_VMX_ENTRY_FAILURES = {
    33: "VM-entry failure due to invalid guest state (VMX basic exit reason 33)",
    34: "VM-entry failure due to MSR loading (VMX basic exit reason 34)",
    41: "VM-entry failure due to a machine check (VMX basic exit reason 41)",
}
_SVM_INVALID = -1  # VMEXIT_INVALID, AMD APM Vol. 2 appendix C


def entry_failure(reason: int) -> str:
    """``hardware_entry_failure_reason`` in words, whatever its width and sign."""
    for bits in (32, 64):
        if reason in (_SVM_INVALID, (1 << bits) - 1):
            return "VMRUN found the guest state invalid (SVM VMEXIT_INVALID, -1)"
    if reason >> 31 & 1 and reason < 1 << 32:
        basic = reason & 0xFFFF
        return _VMX_ENTRY_FAILURES.get(basic, f"VM-entry failure, VMX basic exit reason {basic}")
    return f"VM entry failed, hardware reason {reason:#x} (a VMX instruction error, or unknown)"


def explain_fail_entry(
    reason: int, *, sregs: Any, regs: Any, memory: Any = None,
    features: Iterable[str] | None = None, phys_bits: int = 52,
) -> Explanation:  # fmt: skip
    """KVM_EXIT_FAIL_ENTRY: the processor refused to enter the guest.

    Args:
        reason: ``hardware_entry_failure_reason`` as KVM gave it.
    """
    found = _examine(
        f"KVM_EXIT_FAIL_ENTRY: {entry_failure(reason)}", sregs, regs, memory, phys_bits, features
    )
    if not found.findings:
        found.hints.append(
            "no rule that is checked here is broken. State outside these registers can be refused "
            "too: debug registers (DR6, DR7 above bit 31), PAT, SYSENTER bases, a pending event, "
            "the activity state"
        )
    return found


_SUBERRORS = {
    "KVM_INTERNAL_ERROR_EMULATION": "KVM cannot emulate the instruction at RIP",
    "KVM_INTERNAL_ERROR_SIMUL_EX": "two exceptions at once that KVM cannot combine",
    "KVM_INTERNAL_ERROR_DELIVERY_EV": "an exit in the middle of delivering an event to the guest",
    "KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON": "the hardware gave an exit that KVM cannot handle",
}


def explain_internal_error(
    suberror: str, *, sregs: Any, regs: Any, memory: Any = None, data: Sequence[int] = (),
    insn: bytes | None = None, features: Iterable[str] | None = None, phys_bits: int = 52,
) -> Explanation:  # fmt: skip
    """KVM_EXIT_INTERNAL_ERROR: KVM could not go on.

    Args:
        suberror: the name of the suberror, ``KVM_INTERNAL_ERROR_EMULATION``.
        data: ``kvm_run.internal.data``, shown as it is.
        insn: the instruction bytes that KVM reported, if it did; they count before memory.
    """
    words = _SUBERRORS.get(suberror, "a reason that is not known here")
    found = _examine(
        f"KVM_EXIT_INTERNAL_ERROR: {words} ({suberror})",
        sregs, regs, memory, phys_bits, features, ran=True,
    )  # fmt: skip
    if insn:
        found.code = bytes(insn)
        found.instruction = family(found.code, _code64(sregs))
    hints = _fetch_hints(found, memory)
    if regs is not None and _looks_reset(sregs, regs):
        hints.append(
            "these are the registers of a processor after reset: cpu.enter(mode, entry=gpa) was "
            "not called, or the guest reset itself"
        )
    no_code = found.walk is not None and not found.code  # then the emulator is not to blame
    if suberror == "KVM_INTERNAL_ERROR_EMULATION" and not no_code:
        hints += _emulation_hints(found, sregs)
    elif suberror == "KVM_INTERNAL_ERROR_DELIVERY_EV":
        hints.append(
            "the event needed memory that is not RAM, or is read-only: look at the IDT, the GDT, "
            "the TSS and the stack it switches to"
        )
    if data and suberror != "KVM_INTERNAL_ERROR_EMULATION":
        hints.append("data: " + " ".join(f"{int(word):#x}" for word in data))
    found.hints = hints
    return found


def _emulation_hints(found: Explanation, sregs: Any) -> list[str]:
    mode = mode_name(sregs)
    hints = []
    if found.instruction:
        hints.append(
            f"this KVM cannot emulate this instruction in this mode: {found.instruction} in {mode}"
        )
    else:
        hints.append(f"this KVM cannot emulate the instruction at RIP in {mode}")
    hints.append(
        "KVM emulates an instruction when it touches memory that is not RAM (MMIO), and, on back "
        "ends without hardware for the mode, every instruction there. Put the code in ring 3 of "
        'long64 (cpu.enter("long64", ring=3)), which every back end runs natively, or use plain '
        "integer instructions"
    )
    if found.findings:
        hints.append("the state itself is inconsistent, which alone can force emulation; see below")
    return hints


def explain_shutdown(
    *, sregs: Any, regs: Any, memory: Any = None, features: Iterable[str] | None = None,
    phys_bits: int = 52, known: Sequence[str] = (),
) -> Explanation:  # fmt: skip
    """KVM_EXIT_SHUTDOWN: an exception whose handling failed, twice (a triple fault).

    The registers are those at the first exception; some processors reset them instead (SVM), and
    then what is explained is the reset state.

    Args:
        known: what else is known of the guest, in sentences; told where the registers are lost.
    """
    what = "KVM_EXIT_SHUTDOWN: the guest triple-faulted: an exception could not be delivered"
    found = _examine(what, sregs, regs, memory, phys_bits, features, ran=True)
    if _looks_reset(sregs, regs):
        found.hints.append(
            "these are the registers of a processor after reset: AMD's lose theirs in a shutdown. "
            "An IDT whose handlers print and halt shows the exception and where it was"
        )
        found.hints += known
        return found
    hints = _fetch_hints(found, memory)
    if int(sregs.cr0) & 0x80000001 == 1 and int(sregs.cr3):
        hints.append(
            f"CR3 is set ({int(sregs.cr3):#x}) but paging is off (CR0.PG=0). If the guest had it "
            "on: kvm-pvm knows the paging of long mode only, drops CR0.PG otherwise and shuts down"
        )
    if memory is not None and found.walk is not None:
        found.stack_walk = _walk_stack(memory, sregs, regs, phys_bits)
    hints += exception_hints(found.code, found.instruction, sregs, regs)
    hints += idt_hints(memory, sregs)
    stack = found.stack_walk
    if stack is not None and (stack.fault is not None or not _is_ram(memory, stack.gpa)):
        problem = stack.fault or f"gpa {stack.gpa:#x} is not RAM"
        hints.append(f"the stack cannot be written (SS:RSP {int(regs.rsp):#x}): {problem}")
    if int(sregs.cr0) >> 31 & 1 and int(sregs.cr2):
        hints.append(f"the last page fault was at {int(sregs.cr2):#x} (CR2)")
    found.hints = hints
    return found


def _looks_reset(sregs: Any, regs: Any) -> bool:
    return int(regs.rip) == 0xFFF0 and int(sregs.cs.selector) == 0xF000 and not int(sregs.cr0) & 1


def _is_ram(memory: Any, gpa: int | None) -> bool:
    return gpa is not None and peek(memory, gpa, 1) is not None


def _walk_stack(memory: Any, sregs: Any, regs: Any, phys_bits: int) -> Walk:
    """Where the first push of an exception frame goes, in the current ring's stack."""
    size = 8 if _code64(sregs) else 4 if int(sregs.cr0) & 1 else 2
    width = 64 if size == 8 else 32 if int(sregs.ss.db) else 16
    offset = int(regs.rsp) - size & (1 << width) - 1
    return walk_sregs(memory, sregs, _linear(sregs, sregs.ss, offset), "w", phys_bits=phys_bits)
