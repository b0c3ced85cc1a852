"""What a guest executes, instruction by instruction."""

from __future__ import annotations

from pykvm.debug.disassembly import Instruction, instruction
from pykvm.debug.stops import STEP, Stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.cpu import Cpu
    from pykvm.debug.debugger import Debugger
    from pykvm.result import RunResult
    from pykvm.symbols import Symbols

GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12",
           "r13", "r14", "r15", "rflags")  # fmt: skip


class Executed:
    """An instruction that was executed.

    Attributes:
        instruction: address, bytes, text.
        changed: general registers and RFLAGS that it changed, name → new value.
    """

    __slots__ = ("changed", "instruction")

    def __init__(self, instruction: Instruction, changed: dict[str, int]) -> None:
        self.instruction, self.changed = instruction, changed

    @property
    def address(self) -> int:
        """Its linear address."""
        return self.instruction.address

    @property
    def text(self) -> str:
        """It in Intel syntax."""
        return self.instruction.text

    def __repr__(self) -> str:
        changed = " ".join(f"{name}={value:#x}" for name, value in self.changed.items())
        return f"{self.instruction!r}{' ; ' + changed if changed else ''}"


class InstructionTrace:
    """What one vCPU executed; prints as a listing, in notebooks it is a picture of the walk.

    Attributes:
        executed: the instructions, in order.
        result: how the run ended.
    """

    def __init__(
        self, executed: list[Executed], result: RunResult, symbols: Symbols | None = None
    ) -> None:
        self.executed, self.result, self._symbols = executed, result, symbols

    def __len__(self) -> int:
        return len(self.executed)

    def __str__(self) -> str:
        lines = []
        for each in self.executed:
            name = self._symbols.name(each.address) if self._symbols is not None else ""
            if name and "+" not in name:
                lines.append(f"{name}:")
            lines.append(f"  {each!r}")
        return "\n".join([*lines, str(self.result)])

    __repr__ = __str__

    def _repr_svg_(self) -> str:
        from pykvm.debug.walk import of_instructions

        return of_instructions(self, self._symbols)


def registers(cpu: Cpu) -> dict[str, int]:
    """The general registers and RFLAGS by name."""
    regs = cpu.load_regs()
    return {name: getattr(regs, name) for name in GENERAL}


class Recorder:
    """Looks at a vCPU after each of its steps, for :meth:`Debugger.steps`."""

    def __init__(self, debugger: Debugger, cpu: Cpu, limit: int) -> None:
        self._debugger, self._limit = debugger, limit
        self.executed: list[Executed] = []
        self._before = registers(cpu)
        self._next = self._decode(cpu)

    def _decode(self, cpu: Cpu) -> Instruction:
        planted = self._debugger.planted
        return instruction(cpu.memory, cpu.load_sregs(), self._debugger.address(cpu), planted)

    def note(self, cpu: Cpu) -> None:
        """It has executed the instruction that was next."""
        now = registers(cpu)
        changed = {name: value for name, value in now.items() if value != self._before[name]}
        self.executed.append(Executed(self._next, changed))
        self._before, self._next = now, self._decode(cpu)

    def __call__(self, cpu: Cpu) -> Stop | None:
        """After a step: a Stop once there are enough."""
        self.note(cpu)
        if len(self.executed) < self._limit:
            return None
        return Stop(STEP, cpu.index, self._debugger.address(cpu))


def record(
    debugger: Debugger,
    cpu: Cpu,
    limit: int,
    stepping: Callable[[Any], RunResult],
    symbols: Symbols,
) -> InstructionTrace:
    """See ``Machine.instructions``; ``stepping(look)`` runs by single steps."""
    recorder = Recorder(debugger, cpu, limit)
    result = stepping(recorder)
    if result.reason in ("stopped", "debug-exit"):
        cpu._runner.complete()  # the write to the port that ended it
    unfinished = result.reason in (STEP, "timeout", "breakpoint", "interrupted")
    if not unfinished and debugger.address(cpu) != recorder._next.address:
        recorder.note(cpu)  # a HLT or a write to a stop port: it is complete, and no step
    return InstructionTrace(recorder.executed, result, symbols)
