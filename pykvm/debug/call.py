"""Calling a function of the guest from outside."""

from __future__ import annotations

from pykvm.debug import floating
from pykvm.debug.disassembly import bits_of
from pykvm.debug.stops import BREAKPOINT
from pykvm.errors import RunError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pykvm.cpu import Cpu
    from pykvm.debug.debugger import Debugger

_IN_REGISTERS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
_GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12",
            "r13", "r14", "r15", "rip", "rflags")  # fmt: skip
_RED_ZONE = 128
"""Bytes below RSP that a function may use without saying so (System V ABI, AMD64, 3.2.2)."""


def call(
    debugger: Debugger,
    run: Callable[[float | None], Any],
    address: int,
    arguments: Sequence[int],
    timeout: float | None,
) -> int:
    """See ``Machine.call``. The function returns to where the vCPU stands, and is stopped there."""
    cpu = debugger.cpus[0]
    sregs = cpu.load_sregs()
    bits = bits_of(sregs)
    if bits == 16:
        raise ValueError("call() is for 64-bit and 32-bit code")
    if bits == 64 and len(arguments) > len(_IN_REGISTERS):
        raise ValueError(f"call() passes {len(_IN_REGISTERS)} arguments, not {len(arguments)}")
    word = bits // 8
    mask = (1 << bits) - 1
    for argument in arguments:
        if not -(1 << bits - 1) <= argument <= mask:
            raise ValueError(f"{argument:#x} does not fit into {bits} bits")
    regs = cpu.load_regs()
    saved = {name: getattr(regs, name) for name in _GENERAL}
    saved_fpu = floating.take(cpu.vcpu)
    back = cpu.rip
    frame = [back] if bits == 64 else [back, *arguments]
    stack = (cpu.rsp - _RED_ZONE & ~15) - len(frame) * word
    if bits == 64:
        for name, argument in zip(_IN_REGISTERS, arguments, strict=False):
            setattr(cpu, name, argument & mask)
        cpu.rax = 0  # no vector registers are used for arguments
    else:
        stack = (stack & ~15) - 4  # (ESP + 4) is aligned where the function begins
    raw = b"".join((value & mask).to_bytes(word, "little") for value in frame)
    _write(debugger, cpu, sregs.ss.base * (bits != 64) + stack, raw)
    cpu.rsp, cpu.rip = stack, address - (0 if bits == 64 else sregs.cs.base)
    done = stack + word

    told = debugger.told.get(cpu.index)
    point = debugger.breakpoint(
        debugger.address(cpu) - cpu.rip + back, lambda cpu: cpu.rsp == done, once=True
    )
    try:
        result = run(timeout)
    finally:
        point.delete()
    if result.reason != BREAKPOINT or getattr(result.exit, "point", None) is not point:
        raise result.error or RunError(
            f"the function at {address:#x} did not return: {result}", result
        )
    answer = cpu.rax & mask
    for name, value in saved.items():
        setattr(cpu, name, value)
    floating.put(cpu.vcpu, saved_fpu)
    debugger.told.pop(cpu.index, None)
    if told is not None:
        debugger.told[cpu.index] = told
    return answer


def _write(debugger: Debugger, cpu: Cpu, address: int, data: bytes) -> None:
    gpa, last = debugger.gpa(cpu, address), debugger.gpa(cpu, address + len(data) - 1)
    if gpa is None or last != gpa + len(data) - 1:
        raise ValueError(f"the stack at {address:#x} is not mapped to memory: set cpu.rsp first")
    cpu.memory.write(gpa, data)
