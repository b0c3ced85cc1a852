"""The same guest on KVM and on Unicorn (the extra ``pykvm-vmm[emulator]``), step by step.

KVM makes a step, then Unicorn makes it too (:mod:`pykvm.debug.emulator`), and the general registers
are compared, in real mode the segments as well. What neither the guest nor the emulator decides is
taken over from KVM: what ports and devices answer, time, CPUID, and the flags that an instruction
leaves undefined.
"""

from __future__ import annotations

from pykvm.debug.emulator import Emulator
from pykvm.debug.instructions import Executed, Recorder
from pykvm.debug.stops import STEP, Stop
from pykvm.errors import CapabilityError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.cpu import Cpu
    from pykvm.debug.debugger import Debugger
    from pykvm.result import RunResult


class Comparison:
    """How far both went together.

    Attributes:
        steps: instructions that both executed with the same result.
        divergence: the first that they did not, or None.
        differs: of that one, register → (KVM's value, Unicorn's).
        error: what Unicorn cannot do, in its words, or "".
        result: how KVM's run ended.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.divergence: Executed | None = None
        self.differs: dict[str, tuple[int, int]] = {}
        self.error = ""
        self.result: RunResult | None = None

    @property
    def same(self) -> bool:
        """Whether they never differed."""
        return self.divergence is None and not self.error

    def __repr__(self) -> str:
        text = f"<Comparison: {self.steps} steps the same"
        if self.error:
            text += f", then Unicorn stops: {self.error}"
        if self.divergence is not None:
            told = ", ".join(
                f"{name} {kvm:#x} on KVM, {other:#x} on Unicorn"
                for name, (kvm, other) in self.differs.items()
            )
            text += f", then {self.divergence.instruction!r}: {told}"
        return text + ">"


def compare(
    debugger: Debugger, cpu: Cpu, limit: int, stepping: Callable[[Any], RunResult]
) -> Comparison:
    """See ``Machine.compare_with_unicorn``; ``stepping(look)`` runs by single steps."""
    done = Comparison()
    recorder = Recorder(debugger, cpu, limit)
    other = Emulator(debugger, cpu)

    def look(cpu: Cpu) -> Stop | None:
        nonlocal other
        recorder.note(cpu)
        last = recorder.executed.pop()
        done.error = other.step(last.instruction)
        if not done.error:
            done.differs = other.differences()
            if done.differs:
                done.divergence = last
            else:
                done.steps += 1
                if other.is_outgrown():
                    try:
                        other = Emulator(debugger, cpu)
                    except CapabilityError as error:
                        done.error = str(error)
        if done.error or done.differs or done.steps >= limit:
            return Stop(STEP, cpu.index, debugger.address(cpu))
        return None

    done.result = stepping(look)
    return done
