"""Why a guest was stopped, and what was asked to stop it."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.debug.debugger import Debugger

BREAKPOINT = "breakpoint"
WATCHPOINT = "watchpoint"
STEP = "step"
HALTED = "halted"
LIMIT = "limit"
TIMEOUT = "timeout"
AGAIN = "again"
"""Nobody wants to stop here; one step, and the run goes on. Never seen from outside."""


class Stop:
    """A stop, as ``result.exit``.

    Attributes:
        reason: ``"breakpoint"``, ``"watchpoint"`` or ``"step"``.
        cpu: index of the vCPU.
        address: linear address of its next instruction.
        point: the :class:`Breakpoint` or :class:`Watchpoint`; of a step None.
        old, new: of a watchpoint, the bytes before and after, where they are known.
        asked: whether the conditions of all breakpoints there have been asked.
    """

    __slots__ = ("address", "asked", "cpu", "new", "old", "point", "reason")

    def __init__(
        self,
        reason: str,
        cpu: int,
        address: int,
        point: Any = None,
        old: bytes | None = None,
        new: bytes | None = None,
    ) -> None:
        self.reason, self.cpu, self.address, self.point = reason, cpu, address, point
        self.old, self.new = old, new
        self.asked = False

    #: What the end of a run has besides.
    raised = code = None

    @property
    def exit(self) -> Stop:
        """Itself: it may stand for the end of a run."""
        return self

    def __repr__(self) -> str:
        text = f"<{self.reason} at {self.address:#x}, cpu {self.cpu}"
        if self.old is not None and self.new is not None:
            text += f": {self.old.hex(' ')} became {self.new.hex(' ')}"
        return text + ">"


class Breakpoint:
    """A place in the code where runs stop; ``Machine.breakpoint()`` makes it.

    Attributes:
        address: the linear address it was asked for.
        gpa: guest-physical, where the code was when it was set; None for those of debug registers.
        way: how it stops the guest: one of :data:`pykvm.debug.probe.WAYS`.
        condition: called with the vCPU; the run goes on where it returns something false.
        once: it is gone once it has stopped a run.
        hits: times that it stopped a run.
        passed: times that the condition let the guest go on.
    """

    def __init__(
        self,
        owner: Debugger,
        address: int,
        gpa: int | None,
        way: str,
        condition: Callable[[Any], object] | None,
        once: bool,
        name: str,
    ) -> None:
        self._owner = owner
        self.address, self.gpa, self.way = address, gpa, way
        self.condition, self.once, self.name = condition, once, name
        self.hits = self.passed = 0
        self.deleted = False

    def delete(self) -> None:
        """Take it away. Idempotent."""
        self._owner.delete(self)

    def __repr__(self) -> str:
        name = f" {self.name}" if self.name else ""
        state = "deleted" if self.deleted else f"by {self.way}"
        return f"<Breakpoint {self.address:#x}{name} {state}, hit {self.hits} times>"


class Watchpoint:
    """Memory whose accesses stop runs, after the instruction; ``Machine.watch()`` makes it.

    Attributes:
        address: the linear address.
        length: bytes.
        access: ``"w"`` or ``"rw"``.
        way: ``"watch"``: a debug register; ``"step"``: single steps, and a look after each.
        hits: times that it stopped a run.
    """

    def __init__(self, owner: Debugger, address: int, length: int, access: str, way: str) -> None:
        self._owner = owner
        self.address, self.length, self.access, self.way = address, length, access, way
        self.hits = 0
        self.deleted = False
        self.value: bytes | None = None

    def delete(self) -> None:
        """Take it away. Idempotent."""
        self._owner.delete(self)

    def __repr__(self) -> str:
        state = "deleted" if self.deleted else f"by {self.way}"
        return f"<Watchpoint {self.address:#x}, {self.length} bytes, {self.access}, {state}>"
