"""What docs/backends.md says: each difference between back ends, by its smallest guest.

A back end passes by doing what the processor manuals say, or what the page says of one that
executes ring 0 in KVM's emulator. Anything else, a third behaviour or a hang, is news for the page.
"""

from __future__ import annotations

from typing import Any

import pytest

import pykvm
from pykvm import result as reasons

XCR = "mov rax, cr4; or eax, 0x40000; mov cr4, rax; mov eax, 3; xor edx, edx; "
IDT = """
        mov     esp, 0x7000; lidt pointer; {}; ud2
handler: hlt
idt:    .skip 16 * {n}; .word handler, 0x10, 0x8e00, 0, 0, 0, 0, 0
pointer: .word 16 * {n} + 15; .quad idt
"""
ABSENT = {
    "int3": ("long64", IDT.format("int3", n=3)),
    "int n": ("long64", IDT.format("int 0x30", n=0x30)),
    "iret": ("prot32", "mov esp, 0x7000; pushfd; push 8; push offset 9f; iretd; 9: hlt"),
    "cmpxchg16b": ("long64", "mov esp, 0x7000; lock cmpxchg16b [rsp]; hlt"),
    "lar": ("long64", "mov ax, 0x18; lar ecx, ax; hlt"),
    "lsl": ("long64", "mov ax, 0x18; lsl ecx, ax; hlt"),
    "verr": ("long64", "mov ax, 0x18; verr ax; hlt"),
    "verw": ("long64", "mov ax, 0x18; verw ax; hlt"),
    "arpl": ("prot32", "mov eax, 8; mov ecx, 3; arpl ax, cx; hlt"),
    "bound": ("prot32", "mov dword ptr [0x7004], 5; xor eax, eax; bound eax, [0x7000]; hlt"),
    "daa": ("prot32", "daa; hlt"),
    "sse": ("long64", "pxor xmm0, xmm0; hlt"),
    "movd": ("long64", "movd xmm0, eax; hlt"),
    "mmx": ("long64", "pxor mm0, mm0; emms; hlt"),
    "x87": ("long64", "fninit; fld1; hlt"),
    "ldmxcsr": ("long64", "mov dword ptr [0x7000], 0x1f80; ldmxcsr [0x7000]; hlt"),
    "stmxcsr": ("long64", "stmxcsr [0x7000]; hlt"),
    "xsave": ("long64", XCR + "xsave [0x9000]; hlt"),
    "xrstor": ("long64", XCR + "xsave [0x9000]; xrstor [0x9000]; hlt"),
    "xgetbv": ("long64", XCR + "xor ecx, ecx; xgetbv; hlt"),
    "popcnt": ("long64", "popcnt eax, ecx; hlt"),
    "crc32": ("long64", "crc32 eax, ecx; hlt"),
    "rdtscp": ("long64", "rdtscp; hlt"),
}
PRESENT = {
    "ud2": ("long64", IDT.format("ud2", n=6)),
    "int n in real mode": (
        "real16", "mov word ptr [0x84], offset 9f; mov word ptr [0x86], 0; int 0x21; ud2; 9: hlt",
    ),
    "int3 in real mode": (
        "real16", "mov word ptr [12], offset 9f; mov word ptr [14], 0; int3; ud2; 9: hlt",
    ),
    "iret in real mode": ("real16", "pushf; push cs; push offset 9f; iret; 9: hlt"),
    "iretq": (
        "long64",
        "mov esp, 0x7000; push 0x18; push 0x7000; pushfq; push 0x10; push offset 9f; iretq; "
        "ud2; 9: hlt",
    ),
    "retf": ("prot32", "mov esp, 0x7000; push 8; push offset 9f; retf; ud2; 9: hlt"),
    "cmpxchg8b": ("long64", "lock cmpxchg8b [0x7000]; hlt"),
    "xadd": ("long64", "lock xadd [0x7000], eax; hlt"),
    "fninit": ("long64", "fninit; hlt"),
    "fxsave": ("long64", "fxsave [0x7000]; hlt"),
    "xsetbv": ("long64", XCR + "xor ecx, ecx; xsetbv; hlt"),
    "bit scans": ("long64", "mov ecx, 8; bsf eax, ecx; bsr eax, ecx; lzcnt eax, ecx; hlt"),
    "control registers": ("long64", "mov rax, cr0; mov cr0, rax; mov rax, cr4; mov cr4, rax; hlt"),
    "debug registers": ("long64", "mov rax, dr7; mov dr7, rax; hlt"),
    "msrs": ("long64", "mov ecx, 0xc0000080; rdmsr; wrmsr; hlt"),
    "cpuid": ("long64", "xor eax, eax; cpuid; hlt"),
    "rdtsc": ("long64", "rdtsc; hlt"),
    "string instructions": (
        "long64", "mov ecx, 3; mov esi, 0x7000; mov edi, 0x7100; cld; rep movsb; hlt",
    ),
}  # fmt: skip


def run(mode: Any, text: str, **enter: int) -> tuple[pykvm.Machine, pykvm.RunResult]:
    """Run a few instructions; the caller closes the machine."""
    m = pykvm.Machine("64K")
    try:
        m.load(pykvm.asm(text, mode, at=0x8000))
        m.cpu.enter(mode, 0x8000, **enter)
        return m, m.run(timeout=2)
    except BaseException:
        m.close()
        raise


def ends(mode: Any, text: str, **enter: int) -> str:
    m, result = run(mode, text, **enter)
    with m:
        return result.reason


def ring0_is_emulated() -> bool:
    """Probe: an instruction that every 64-bit processor has and KVM's emulator has not."""
    return ends(*ABSENT["verr"]) == reasons.INTERNAL_ERROR


@pytest.mark.parametrize("name", PRESENT)
def test_an_instruction_that_guests_may_count_on_in_ring_0(name: str) -> None:
    assert ends(*PRESENT[name]) == reasons.HALTED


@pytest.mark.parametrize("name", ABSENT)
def test_an_instruction_that_an_emulated_ring_0_lacks(name: str) -> None:
    expected = reasons.INTERNAL_ERROR if ring0_is_emulated() else reasons.HALTED
    assert ends(*ABSENT[name]) == expected


def test_an_instruction_that_cannot_be_emulated_is_explained() -> None:
    m, result = run(*ABSENT["cmpxchg16b"])
    with m:
        if result.reason == reasons.HALTED:
            pytest.skip("probe: this KVM executes cmpxchg16b in ring 0")
        assert m.cpu.rip == 0x8005
        assert result.error is not None and "cmpxchg16b" in str(result.error).lower()


def test_sse_runs_natively_in_ring_3() -> None:
    text = "movd xmm0, eax; pxor xmm0, xmm0; popcnt eax, ecx; xor eax, eax; out 0xf4, al"
    with pykvm.Machine("64K") as m:
        m.debug_exit()
        m.load(pykvm.asm(text, at=0x8000))
        m.cpu.enter("long64", 0x8000, ring=3, iopl=3)
        assert m.run(timeout=2).code == 0


def test_int_n_in_ring_3_arrives_or_ends_in_a_double_fault() -> None:
    """Through a gate of DPL 3; the handler halts, which only ring 0 may."""
    text = IDT.format("int 0x30", n=0x30).replace("mov     esp, 0x7000; lidt pointer; ", "")
    code = pykvm.asm(text.replace("0x8e00", "0xee00"), at=0x8000)
    with pykvm.Machine("64K") as m:
        m.load(code)
        m.cpu.enter("long64", 0x8000, ring=3)
        m.cpu.idt.base, m.cpu.idt.limit = code.symbols["idt"], 16 * 0x30 + 15
        expected = reasons.SHUTDOWN if ring0_is_emulated() else reasons.HALTED
        assert m.run(timeout=2).reason == expected


def test_ports_are_open_to_ring_3_when_iopl_is_3_and_closed_otherwise() -> None:
    text = "out 0xf4, al"
    for iopl, expected in ((3, reasons.DEBUG_EXIT), (0, reasons.SHUTDOWN)):
        with pykvm.Machine("64K") as m:
            m.debug_exit()
            m.load(pykvm.asm(text, at=0x8000))
            m.cpu.enter("long64", 0x8000, ring=3, iopl=iopl)
            assert m.run(timeout=2).reason == expected
