"""How a run ended: a value, never an exception, until :meth:`RunResult.check` is called."""

from __future__ import annotations

from pykvm.errors import RunError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

HALTED = "halted"
"""Every vCPU that ran executed HLT (without an in-kernel LAPIC: with one, HLT never exits)."""
STOPPED = "stopped"
"""``Machine.stop()`` was called, by a handler or another thread, or a stop port was written."""
DEBUG_EXIT = "debug-exit"
"""The guest wrote its exit code to the debug-exit port: ``result.code``."""
TIMEOUT = "timeout"
"""The time given to the run is over."""
LIMIT = "limit"
"""A vCPU made as many exits as it was allowed."""
INTERRUPTED = "interrupted"
"""Ctrl-C (SIGINT)."""
SHUTDOWN = "shutdown"
"""Triple fault: the processor could not deliver an exception and gave up."""
FAILED_ENTRY = "failed-entry"
"""The processor, or KVM, refused to enter the guest with this state."""
INTERNAL_ERROR = "internal-error"
"""KVM could not go on, mostly because it cannot emulate an instruction."""
UNCLAIMED = "unclaimed"
"""The guest used a port or an address that nobody claimed: ``result.exit``."""
OTHER_EXIT = "exit"
"""An exit that no hook handles, decoded in ``result.exit``."""

BREAKPOINT = "breakpoint"
"""A breakpoint was reached: ``result.exit``, a :class:`pykvm.debug.stops.Stop`."""
WATCHPOINT = "watchpoint"
"""Memory that is watched was written or read: ``result.exit``."""
STEP = "step"
"""As many single steps were made as were asked for."""

REPLAYED = "replayed"
"""A replay came to the end of its log."""
DIVERGED = "diverged"
"""A replay went another way than its log: ``result.exit`` says where."""

POWER_OFF = "power-off"
"""A booted machine switched itself off."""
REBOOT = "reboot"
"""A booted machine reset itself."""
PANIC = "panic"
"""A booted kernel panicked, as its console or the pvpanic device said."""
UNSUPPORTED = "unsupported"
"""What was booted cannot run on this KVM, and was given up: the error says why."""
TERMINATED = "terminated"
"""The process was asked to end (SIGTERM, SIGHUP): ``pykvm boot`` and ``pykvm run`` end so."""

REASONS = (
    HALTED, STOPPED, DEBUG_EXIT, TIMEOUT, LIMIT, INTERRUPTED, SHUTDOWN, FAILED_ENTRY,
    INTERNAL_ERROR, UNCLAIMED, OTHER_EXIT, BREAKPOINT, WATCHPOINT, STEP, REPLAYED, DIVERGED,
    POWER_OFF, REBOOT, PANIC, UNSUPPORTED, TERMINATED,
)  # fmt: skip

_GOOD = (HALTED, STOPPED, POWER_OFF, BREAKPOINT, WATCHPOINT, STEP, REPLAYED)

WATCHED = (TIMEOUT, INTERRUPTED, UNSUPPORTED, TERMINATED)
"""The guest was cut short from outside: ``result.cpus`` says where it was."""


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{seconds * 1000:.3g} ms"


class CpuState:
    """Where a vCPU was when the run ended.

    Attributes:
        index: which vCPU.
        rip: its instruction pointer (an offset into CS).
        code: up to 16 bytes of guest memory there, b"" where nothing is mapped.
        halted: True if it sits in HLT.
        interrupts: the state of RFLAGS.IF; a halted vCPU without it never wakes again.
        symbol: name and offset of the kernel's symbol there, or "".
        waiting: True if nobody has started it yet (it waits for INIT or the start-up IPI).
    """

    __slots__ = ("code", "halted", "index", "interrupts", "rip", "symbol", "waiting")

    def __init__(
        self,
        index: int,
        rip: int,
        code: bytes,
        halted: bool,
        interrupts: bool,
        symbol: str = "",
        waiting: bool = False,
    ) -> None:
        self.index = index
        self.rip = rip
        self.code = code
        self.halted = halted
        self.interrupts = interrupts
        self.symbol = symbol
        self.waiting = waiting

    def __repr__(self) -> str:
        if self.waiting:
            return f"cpu {self.index} not started: it waits for its start-up IPI"
        doing = "halted" if self.halted else "running"
        flag = "IF=1" if self.interrupts else "IF=0"
        where = f" <{self.symbol}>" if self.symbol else ""
        code = self.code.hex(" ") or "nothing mapped"
        return f"cpu {self.index} {doing} at rip {self.rip:#x}{where} {flag} [{code}]"


class RunResult:
    """How a run ended.

    Attributes:
        reason: one of ``pykvm.result.REASONS``.
        exits: exits that the guest made in this run, of all its vCPUs.
        steps: instructions that ``m.step()``, ``m.run_until(condition)`` and their like stepped
            over; the one that ended the run otherwise, a HLT for example, is not among them.
            None of any other run.
        seconds: wall-clock time.
        exit: the decoded last exit (``pykvm.kvm.exits``) or the access that ended the run, or
            None where the run did not end with one.
        code: the exit code, for "debug-exit" and stop ports, else None.
        cpu: index of the vCPU that ended the run.
        cpus: where every vCPU was, one :class:`CpuState` each, after "timeout", "interrupted",
            "terminated" and "unsupported".
        timings: of a booted machine, seconds from ``boot()`` to each phase: "read", "unpack",
            "load", "first_instruction", "first_byte".
        devices: what every virtio device has counted since it was made, by its name.
        advice: of a booted kernel that this KVM cannot run: why, and what to do; else "".
        error: the explanation as an exception, for the reasons that are failures, else None.
    """

    __slots__ = (
        "advice", "code", "cpu", "cpus", "devices", "error", "exit", "exits", "reason", "seconds",
        "steps", "timings",
    )  # fmt: skip

    def __init__(
        self,
        reason: str,
        *,
        exits: int = 0,
        seconds: float = 0.0,
        exit: Any = None,
        code: int | None = None,
        cpu: int = 0,
        cpus: tuple[CpuState, ...] = (),
        error: Exception | None = None,
        timings: dict[str, float] | None = None,
    ) -> None:
        self.reason = reason
        self.exits = exits
        self.steps: int | None = None
        self.seconds = seconds
        self.exit = exit
        self.code = code
        self.cpu = cpu
        self.cpus = cpus
        self.error = error
        self.advice = ""
        self.timings = timings or {}
        self.devices: dict[str, dict[str, Any]] = {}

    @property
    def ok(self) -> bool:
        """True if the guest ended by itself, or as it was asked to.

        Halted, stopped, powered off, debug-exit 0; a breakpoint, a watchpoint, a step; replayed.
        """
        return self.reason in _GOOD or (self.reason == DEBUG_EXIT and self.code == 0)

    def check(self) -> Self:
        """Return self if :attr:`ok`; else raise what happened.

        Raises:
            KeyboardInterrupt: the run was interrupted by Ctrl-C.
            VcpuExitError: failed entry, internal error or shutdown, with the explanation.
            RunError: anything else.
        """
        if self.ok:
            return self
        if self.reason == INTERRUPTED:
            raise KeyboardInterrupt
        raise self.error or RunError(str(self), self)

    def __str__(self) -> str:
        text = self.reason
        if self.code is not None:
            text += f" {self.code}"
        if self.exit is not None and self.reason in (UNCLAIMED, OTHER_EXIT, DIVERGED):
            text += f" {self.exit!r}"
        if len(self.cpus) > 1 or self.reason not in (*WATCHED, LIMIT):
            text += f" on cpu {self.cpu}" if len(self.cpus) > 1 else ""
        steps = "" if self.steps is None else f"{self.steps} steps, "
        text += f" after {steps}{self.exits} exits, {_duration(self.seconds)}"
        return "\n  ".join([text, *map(repr, self.cpus)])

    def __repr__(self) -> str:
        return f"<RunResult {self}>"
