"""The guest's code as instructions, by capstone (the extra ``pykvm-vmm[debug]``)."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.cpu import Cpu
    from pykvm.debug.planted import Planted

LONGEST = 15
"""Bytes of an instruction (SDM Vol. 2A §2.3.11)."""

_engines: dict[int, Any] = {}


class Instruction:
    """One instruction of the guest.

    Attributes:
        address: linear.
        code: its bytes; of what cannot be disassembled, one byte.
        text: in Intel syntax, ``mov eax, 1``; ``(bad)``.
    """

    __slots__ = ("address", "code", "text")

    def __init__(self, address: int, code: bytes, text: str) -> None:
        self.address, self.code, self.text = address, code, text

    def __repr__(self) -> str:
        return f"{self.address:#x}: {self.code.hex(' '):<24} {self.text}"


def missing() -> str:
    """Why nothing can be disassembled: "" if it can."""
    try:
        import capstone  # noqa: F401
    except ImportError:
        return "capstone is not installed: pip install 'pykvm-vmm[debug]'"
    return ""


def bits_of(sregs: Any) -> int:
    """How the code at CS is decoded: 16, 32 or 64."""
    if sregs.efer & 1 << 10 and sregs.cs.l:
        return 64
    return 32 if sregs.cs.db and sregs.cr0 & 1 else 16


def engine(bits: int) -> Any:
    """A capstone engine with details.

    Raises:
        CapabilityError: capstone is missing.
    """
    if bits not in _engines:
        problem = missing()
        if problem:
            from pykvm.errors import CapabilityError

            raise CapabilityError(problem)
        import capstone

        mode = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}[bits]
        made = capstone.Cs(capstone.CS_ARCH_X86, mode)
        made.detail = True
        _engines[bits] = made
    return _engines[bits]


def read_code(memory: Any, sregs: Any, address: int, length: int, planted: Planted | None) -> bytes:
    """The guest's own bytes at a linear address, as many as are mapped: without planted stops."""
    from pykvm.arch.x86_64.walk import read_virtual, translate

    code = bytearray(read_virtual(memory, sregs, address, length))
    if planted:
        at = 0
        while at < len(code):  # page by page
            piece = min(len(code) - at, 0x1000 - (address + at) % 0x1000)
            gpa = translate(memory, sregs, address + at)
            if gpa is not None:
                code[at : at + piece] = planted.hide(gpa, bytes(code[at : at + piece]))
            at += piece
    return bytes(code)


def instruction(memory: Any, sregs: Any, address: int, planted: Planted | None) -> Instruction:
    """The instruction at a linear address."""
    code = read_code(memory, sregs, address, LONGEST, planted)
    for found in engine(bits_of(sregs)).disasm(code, address, 1):
        return Instruction(address, bytes(found.bytes), f"{found.mnemonic} {found.op_str}".strip())
    return Instruction(address, code[:1], "(bad)")


def branches(found: Any) -> bool:
    """Whether an instruction may go elsewhere, but for returns.

    To capstone LOOP is no jump, but relative; an indirect jump is one, and not relative.
    """
    import capstone

    groups = capstone.CS_GRP_JUMP, capstone.CS_GRP_CALL, capstone.CS_GRP_BRANCH_RELATIVE
    return any(found.group(group) for group in groups)


def successors(cpu: Cpu, memory: Any, planted: Planted | None) -> set[int]:
    """Linear addresses of all instructions that may come after the next one of a vCPU.

    But for exceptions and interrupts: their handlers are not among them.
    """
    import capstone
    from capstone import x86

    sregs, regs = cpu.load_sregs(), cpu.load_regs()
    bits = bits_of(sregs)
    base = 0 if bits == 64 else sregs.cs.base
    address = base + regs.rip
    code = read_code(memory, sregs, address, LONGEST, planted)
    found = next(iter(engine(bits).disasm(code, address, 1)), None)
    if found is None:
        return set()
    after = address + found.size
    if found.group(capstone.CS_GRP_RET) or found.group(capstone.CS_GRP_IRET):
        return {base + word for word in _words(memory, sregs, regs.rsp, bits)}
    if found.id in (x86.X86_INS_SYSCALL,):
        return {after, cpu.msr["LSTAR"]}
    if not branches(found):
        return {after}
    operand = found.operands[0]
    if operand.type == x86.X86_OP_IMM:
        target = operand.imm & (1 << 64) - 1
    elif operand.type == x86.X86_OP_REG:
        target = base + _register(regs, found.reg_name(operand.reg))
    else:
        mem = operand.mem
        where = mem.disp
        if mem.base:
            name = found.reg_name(mem.base)
            where += after if name in ("rip", "eip") else _register(regs, name)
        if mem.index:
            where += _register(regs, found.reg_name(mem.index)) * mem.scale
        if mem.segment:
            where += getattr(sregs, found.reg_name(mem.segment)).base
        words = _words(memory, sregs, where & (1 << 64) - 1, bits, stack=False)
        target = base + next(iter(words), 0)
    unconditional = found.id in (x86.X86_INS_JMP, x86.X86_INS_CALL)
    return {target} if unconditional else {after, target}


def _register(regs: Any, name: str) -> int:
    """What a register of 32 or 64 bits holds that an address is made of; of a pseudo one 0."""
    whole = "r" + name[1:].removesuffix("d")
    value: int = getattr(regs, whole, 0)
    return value & 0xFFFFFFFF if name[0] == "e" or name[-1] == "d" else value


def _words(memory: Any, sregs: Any, at: int, bits: int, stack: bool = True) -> list[int]:
    from pykvm.arch.x86_64.walk import read_virtual

    base = sregs.ss.base if stack and bits != 64 else 0
    raw = read_virtual(memory, sregs, base + at, bits // 8)
    return [int.from_bytes(raw, "little")] if len(raw) == bits // 8 else []
