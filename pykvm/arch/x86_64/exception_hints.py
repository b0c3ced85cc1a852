"""Which exception a guest may have met, and whether its IDT could have taken it, in words."""

from __future__ import annotations

from .tables import Idt, exception_name
from .walk import PF, walk_sregs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def exception_hints(code: bytes, instruction: str, sregs: Any, regs: Any) -> list[str]:
    """Which exception the instruction at RIP is likely to raise by itself."""
    ring = int(sregs.ss.dpl) & 3 if int(sregs.cr0) & 1 else 0
    if instruction.startswith(("UD", "INT")):
        return [f"the instruction at RIP is {instruction}: it raises an exception itself"]
    if instruction == "SYSCALL" and not int(sregs.efer) & 1:
        return ["SYSCALL with EFER.SCE=0 raises #UD"]
    for prefix, bit, name in (("SSE", 9, "OSFXSR"), ("SSSE3", 9, "OSFXSR"), ("AVX", 18, "OSXSAVE")):
        if instruction.startswith(prefix) and not int(sregs.cr4) >> bit & 1:
            return [f"{instruction}: with CR4.{name}=0 {prefix} raises #UD"]
    if code[:2] in (b"\x0f\x30", b"\x0f\x32"):
        name, msr = "RDMSR" if code[1] == 0x32 else "WRMSR", int(regs.rcx) & 0xFFFFFFFF
        if ring:
            return [f"{name} raises #GP in ring {ring}"]
        value = "" if name == "RDMSR" else ", or it does not take this value"
        return [
            f"{name} of MSR {msr:#x} (ECX) raises #GP if KVM or the vCPU's CPUID does not have it"
            f"{value}; m.on_msr({msr:#x}, …) serves it here"
        ]
    if ring and code[:1] in (b"\xf4", b"\xfa", b"\xfb"):
        name = {0xF4: "HLT", 0xFA: "CLI", 0xFB: "STI"}[code[0]]
        return [
            f"{name} raises #GP in ring {ring}" + (" unless IOPL is 3" if name != "HLT" else "")
        ]
    if ring and (code[:1] and (0xE4 <= code[0] <= 0xE7 or 0xEC <= code[0] <= 0xEF)):
        return [
            "IN and OUT raise #GP in ring 3, unless IOPL is 3 or the TSS permits the port "
            "(enter(..., iopl=3) sees to both)"
        ]
    return []


def idt_hints(memory: Any, sregs: Any) -> list[str]:
    """Whether the IDT could take an exception at all."""
    base, limit = int(sregs.idt.base), int(sregs.idt.limit)
    if not int(sregs.cr0) & 1:
        if limit < 0x3F:
            return [f"IDTR.limit is {limit:#x}: too short for the real-mode vectors (IVT)"]
        return []
    size = 16 if int(sregs.efer) >> 10 & 1 else 8
    if limit < size - 1:
        return [
            f"there is no IDT (IDTR.limit {limit:#x}): any exception or interrupt is a triple "
            "fault. Give the guest an IDT to see which one it was"
        ]
    if memory is None:
        return []
    table = Idt.read(memory, sregs)
    if len(bytes(table)) < size:
        walk = walk_sregs(memory, sregs, base, user=False, ac=True)
        reason = walk.fault or f"gpa {walk.gpa:#x} is not RAM"
        return [f"the IDT at {base:#x} cannot be read: {reason}"]
    # Those that a double fault comes from, and the double fault itself.
    wanted = [vector for vector in (6, 8, 13, PF) if not _present(table, vector)]
    if wanted:
        names = ", ".join(exception_name(vector) for vector in wanted)
        return [f"the IDT at {base:#x} has no handler for {names}"]
    return []


def _present(table: Idt, vector: int) -> bool:
    gate = table[vector]
    return gate is not None and bool(gate.present)
