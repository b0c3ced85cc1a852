"""Naming the family of an instruction from its first bytes: enough to say why KVM gave up on it.

Not a disassembler. KVM's own emulator is asked to run an instruction when the guest touches memory
that is not RAM, when a back end has no hardware for the mode the guest is in, or when the state is
one that hardware refuses. It knows the integer instructions; these families it knows in part, or
not at all (Linux arch/x86/kvm/emulate.c, the opcode tables).
"""

from __future__ import annotations

# Legacy prefixes: operand and address size, LOCK, REPNE, REP, segment overrides.
_PREFIXES = frozenset((0x66, 0x67, 0xF0, 0xF2, 0xF3, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65))

_SINGLE = {
    0x9B: "FWAIT (x87)",
    0xCC: "INT3 (breakpoint)",
    0xCE: "INTO",
    0xF1: "INT1",
}
# 0F 01 /r with a register operand: instructions by ModRM byte.
_GROUP_01 = {
    0xC1: "VMCALL (hypercall)", 0xC8: "MONITOR", 0xC9: "MWAIT", 0xCA: "CLAC", 0xCB: "STAC",
    0xD0: "XGETBV", 0xD1: "XSETBV", 0xD9: "VMMCALL (hypercall)", 0xEE: "RDPKRU", 0xEF: "WRPKRU",
    0xF8: "SWAPGS", 0xF9: "RDTSCP", 0xFC: "CLZERO",
}  # fmt: skip
# 0F AE /reg with a memory operand.
_GROUP_AE = (
    "FXSAVE", "FXRSTOR", "LDMXCSR (SSE)", "STMXCSR (SSE)", "XSAVE", "XRSTOR", "XSAVEOPT or CLWB",
    "CLFLUSH",
)  # fmt: skip
# 0F AE /reg with a register operand, F3 in front: FS and GS base.
_GROUP_AE_F3 = ("RDFSBASE", "RDGSBASE", "WRFSBASE", "WRGSBASE")
_GROUP_C7 = {3: "XRSTORS", 4: "XSAVEC", 5: "XSAVES"}

_SSE = (
    frozenset(range(0x10, 0x18)) | frozenset(range(0x28, 0x30)) | frozenset(range(0x50, 0x77))
    | frozenset(range(0x7C, 0x80)) | frozenset((0xC2, 0xC4, 0xC5, 0xC6))
    | frozenset(range(0xD0, 0xFF))
)  # fmt: skip
_TWO_BYTE = {
    0x05: "SYSCALL", 0x07: "SYSRET", 0x0B: "UD2 (undefined on purpose)", 0x34: "SYSENTER",
    0x35: "SYSEXIT", 0x38: "SSSE3, SSE4 or AES", 0x3A: "SSSE3, SSE4 or AES", 0x77: "EMMS (MMX)",
    0xB9: "UD1", 0xFF: "UD0",
}  # fmt: skip


def family(code: bytes, long: bool = True) -> str:
    """What kind of instruction ``code`` starts with, or "" for the plain integer ones.

    Args:
        code: the bytes at RIP; a few suffice, too few give "".
        long: whether they are 64-bit code, where 40-4F are REX prefixes.
    """
    at, rep, rex = 0, 0, 0
    while at < len(code) and code[at] in _PREFIXES:
        rep = code[at] if code[at] in (0xF2, 0xF3) else rep
        at += 1
    if long and at < len(code) and code[at] & 0xF0 == 0x40:
        rex, at = code[at], at + 1
    rest = code[at : at + 3]
    if not rest:
        return ""
    opcode, modrm = rest[0], rest[1] if len(rest) > 1 else 0
    if opcode in _SINGLE:
        return _SINGLE[opcode]
    if opcode == 0xCD:
        return f"INT {modrm:#x}" if len(rest) > 1 else "INT"
    if 0xD8 <= opcode <= 0xDF:
        return "x87 floating point"
    # C4, C5 and 62 are LES, LDS and BOUND outside 64-bit code unless a register follows.
    if opcode in (0xC4, 0xC5, 0x62) and (long or modrm >= 0xC0):
        return "AVX-512" if opcode == 0x62 else "AVX or BMI (VEX encoding)"
    if opcode == 0x0F and len(rest) > 1:
        return _two_byte(rest[1], rest[2] if len(rest) > 2 else None, rep, bool(rex & 8))
    return ""


def _two_byte(opcode: int, modrm: int | None, rep: int, wide: bool) -> str:
    if opcode in _TWO_BYTE:
        return _TWO_BYTE[opcode]
    if opcode in _SSE:
        return "SSE or MMX"
    if modrm is None:
        return ""
    register, field = modrm >= 0xC0, modrm >> 3 & 7
    if opcode == 0x01:
        return _GROUP_01.get(modrm, "")
    if opcode == 0xAE:
        if not register:
            return _GROUP_AE[field]
        if rep == 0xF3 and field < 4:
            return _GROUP_AE_F3[field]
        return "a memory fence" if field >= 5 else ""
    if opcode == 0xC7:
        if register:
            return {6: "RDRAND", 7: "RDPID" if rep == 0xF3 else "RDSEED"}.get(field, "")
        if field == 1:
            return "CMPXCHG16B" if wide else "CMPXCHG8B"
        return _GROUP_C7.get(field, "")
    return ""
