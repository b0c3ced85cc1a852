"""Stopping a guest where it is wanted: breakpoints, watchpoints, single steps.

A machine with a debugger runs through :meth:`Debugger.run`, which steps over the breakpoint that it
stands at, arms what is to stop it, runs, and looks whether the stop is wanted. While a run is on,
:meth:`Debugger.struck` and :meth:`Debugger.exit` are called in the vCPU's own thread.
"""

from __future__ import annotations

from pykvm import kvm
from pykvm.debug import probe
from pykvm.debug.stepping import LENGTHS, REGISTERS, REGS, Stepping, _once
from pykvm.debug.stops import AGAIN, BREAKPOINT, STEP, WATCHPOINT, Breakpoint, Stop, Watchpoint
from pykvm.errors import CapabilityError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.cpu import Cpu
    from pykvm.debug.stepping import Go, Look
    from pykvm.debugging import Debugging
    from pykvm.symbols import Symbols


LOOKED_AT = 0x10000
"""Bytes that a watchpoint by single steps may have: all of them are read after each."""


class Debugger(Stepping):
    """What stops the vCPUs of one machine.

    Args:
        machine: the machine.
        make: makes a small machine on the same KVM, for :mod:`pykvm.debug.probe`.
    """

    def __init__(self, machine: Debugging, make: Callable[[], Any]) -> None:
        super().__init__(machine, make)
        self._excused: set[tuple[int, int]] = set()
        self.told: dict[int, tuple[int, list[Breakpoint]]] = {}  # by vCPU: where, of which
        self._steps: tuple[Cpu, Look] | None = None
        for cpu in self.cpus:
            cpu._runner.debug = self

    @property
    def symbols(self) -> Symbols:
        """The machine's names for addresses."""
        return self._machine.symbols

    # ---- what there is to stop at ----------------------------------------------------------------

    def breakpoint(
        self,
        address: int,
        condition: Callable[[Any], object] | None = None,
        *,
        how: str = "auto",
        once: bool = False,
        gpa: int | None = None,
        name: str = "",
        cpu: Cpu | None = None,
    ) -> Breakpoint:
        """See ``Machine.breakpoint``; ``cpu``: whose mode and page tables count."""
        cpu = cpu or self.cpus[0]
        _check_address(address)
        if gpa is None:
            gpa = self.gpa(cpu, address)
        way = self._way_to_break(cpu, address, gpa, how)
        point = Breakpoint(
            self, address, gpa if way == probe.PORT else None, way, condition, once, name
        )
        if way == probe.PORT:
            assert gpa is not None
            self.plant(gpa, point_of := self._strike(point))
            point._undo = lambda: self.unplant(gpa, point_of)  # type: ignore[attr-defined]
        self.breakpoints.append(point)
        return point

    def _way_to_break(self, cpu: Cpu, address: int, gpa: int | None, how: str) -> str:
        ways = [probe.PORT, probe.HARDWARE, probe.STEP] if how == "auto" else [how]
        if how not in ("auto", probe.PORT, probe.HARDWARE, probe.STEP):
            raise ValueError(f'how is "auto", "port", "hardware" or "step", not {how!r}')
        problems = []
        for way in ways:
            problem = self.obstacle(way, cpu)
            if not problem and way == probe.PORT and gpa is None:
                problem = "nothing is mapped there: pass gpa="
            if not problem and way == probe.HARDWARE and self._registers_used() >= REGISTERS:
                problem = f"all {REGISTERS} debug registers are taken"
            if not problem and way == probe.STEP:
                problem = self._apart()
            if not problem:
                return way
            problems.append(f"{way}: {problem}")
        mode = probe.mode_of(cpu.load_sregs())
        raise CapabilityError(f"no breakpoint at {address:#x} in {mode}: {'; '.join(problems)}")

    def _apart(self) -> str:
        """Why vCPUs cannot be stepped in turns: "" if they can."""
        if len(self.cpus) > 1 and self._machine.irqchip is not None:
            return (
                "several vCPUs cannot be stepped together where they wait in the kernel (irqchip)"
            )
        return ""

    def _registers_used(self) -> int:
        points: list[Any] = [*self.breakpoints, *self.watchpoints]
        return sum(point.way in (probe.HARDWARE, probe.WATCH) for point in points)

    def watch(
        self, address: int, length: int, access: str = "w", *, how: str = "auto", cpu: Any = None
    ) -> Watchpoint:
        """See ``Machine.watch``."""
        cpu = cpu or self.cpus[0]
        if access not in ("w", "rw"):
            raise ValueError(f'access is "w" or "rw", not {access!r}: a processor has no other')
        _check_address(address)
        if length < 1:
            raise ValueError(f"length {length}: at least a byte")
        if how not in ("auto", probe.WATCH, probe.STEP):
            raise ValueError(f'how is "auto", "watch" or "step", not {how!r}')
        problems = []
        for way in [probe.WATCH, probe.STEP] if how == "auto" else [how]:
            problem = self.obstacle(way, cpu)
            if not problem and way == probe.WATCH:
                if length not in LENGTHS or address % length:
                    problem = "a debug register watches 1, 2, 4 or 8 bytes, aligned"
                elif self._registers_used() >= REGISTERS:
                    problem = f"all {REGISTERS} debug registers are taken"
            if way == probe.STEP:
                if problem:
                    missing = self.cannot_decode(cpu)
                    problem = f"{problem}; {missing}" if missing else ""
                if not problem and access != "w":
                    problem = "single steps see writes only"
                if not problem and length > LOOKED_AT:
                    problem = f"after each step {LOOKED_AT:#x} bytes can be looked at, no more"
                problem = problem or self._apart()
            if not problem:
                point = Watchpoint(self, address, length, access, way)
                self.watchpoints.append(point)
                return point
            problems.append(f"{way}: {problem}")
        mode = probe.mode_of(cpu.load_sregs())
        raise CapabilityError(f"no watchpoint at {address:#x} in {mode}: {'; '.join(problems)}")

    def delete(self, point: Any) -> None:
        """Take a breakpoint or watchpoint away. Idempotent."""
        if point.deleted:
            return
        point.deleted = True
        (self.breakpoints if point in self.breakpoints else self.watchpoints).remove(point)
        undo = getattr(point, "_undo", None)
        if undo is not None:
            undo()

    def _strike(self, point: Breakpoint) -> Callable[[Cpu, int], Stop | None]:
        return lambda cpu, address: Stop(BREAKPOINT, cpu.index, address, point)

    # ---- running ---------------------------------------------------------------------------------

    def run(self, cpus: list[Cpu], deadline: int, max_exits: int | None, go: Go) -> tuple[Cpu, Any]:
        """Run the vCPUs until something ends that; ``go`` is how a machine runs undebugged."""
        self.planted.settle()
        self._excused.clear()
        for cpu in cpus:
            cpu._runner.forget_reservation()  # of start(): it is ours now, between runs too
        if self._steps is not None:
            cpu, look = self._steps
            self.told.pop(cpu.index, None)
            return self._tell(cpu, self._walk(cpu, deadline, look, go))
        if self.breakpoints and self._machine._ending is None:
            for cpu in cpus:
                stop = self._due(cpu)
                if stop is not None:
                    return cpu, stop
        watching = [point for point in self.watchpoints if point.way == probe.STEP]
        if watching or any(point.way == probe.STEP for point in self.breakpoints):
            for cpu in cpus:
                self.told.pop(cpu.index, None)
            return self._tell(*self._walk_together(cpus, deadline, watching, go))
        while True:
            for cpu in cpus:
                while self._stands_at_stop(cpu):
                    end = self._walk(cpu, deadline, _once, go)
                    if end.reason != STEP:
                        return self._tell(cpu, end)
                    self._have_told(cpu)
            for cpu in cpus:
                self._arm(cpu)
            cpu, end = go(cpus, deadline, max_exits)
            if end.reason != AGAIN and self._is_wanted(cpu, end):
                return self._tell(cpu, end)
            self._have_told(cpu)

    def steps(self, cpu: Cpu, look: Look | None) -> None:
        """Have the next runs step one vCPU until ``look(cpu)`` gives a Stop; None: run again."""
        self._steps = None if look is None else (cpu, look)

    def _due(self, cpu: Cpu) -> Stop | None:
        """The stop at a breakpoint where a vCPU stands and of which it has not been told yet.

        So it is the same whatever way would stop it there, and a planted one is not executed.
        """
        if cpu._runner.unseen:  # it is in the midst of an instruction, of a planted stop perhaps
            return None
        cpu._runner.complete()
        here = self.address(cpu)
        told = self._told_at(cpu, here)
        fresh = [point for point in self._points_at(cpu, here) if point not in told]
        if not fresh:
            return None
        stop = Stop(BREAKPOINT, cpu.index, here, fresh[0])
        wanted = self._ask(cpu, stop, fresh)
        self._have_told(cpu)
        return stop if wanted else None

    def _told_at(self, cpu: Cpu, here: int) -> list[Breakpoint]:
        address, points = self.told.get(cpu.index, (None, []))
        return points if address == here else []

    def _tell(self, cpu: Cpu, end: Any) -> tuple[Cpu, Any]:
        if end.reason in (BREAKPOINT, STEP):
            self._have_told(cpu)
        return cpu, end

    def _have_told(self, cpu: Cpu) -> None:
        """All breakpoints where it stands have been asked: it goes past them."""
        here = self.address(cpu)
        self.told[cpu.index] = here, self._points_at(cpu, here)

    def pass_over(self, point: Breakpoint) -> None:
        """Have a breakpoint not stop those vCPUs that stand at it already."""
        for cpu in self.cpus:
            if self.address(cpu) == point.address:
                self.told[cpu.index] = point.address, [*self._told_at(cpu, point.address), point]

    def _stands_at_stop(self, cpu: Cpu) -> bool:
        """Whether it has been told of the stop here, and would be stopped again at once."""
        told = self.told.get(cpu.index)
        here = self.address(cpu)
        if told is None or told[0] != here:
            self.told.pop(cpu.index, None)
            return False
        gpa = self.gpa(cpu, here)
        if gpa is not None and gpa in self.planted:
            self._strike_at(cpu, gpa, here)  # others who want to know of it, coverage
            return True
        return any(point.address == here for point in self.breakpoints)

    def entered(self, cpu: Cpu) -> None:
        """It was given a new state, of which nothing has been told."""
        self.told.pop(cpu.index, None)

    def restored(self, planted: bool = False) -> None:
        """Memory and vCPUs were put back from a snapshot, in which nothing is planted.

        Args:
            planted: C has planted all again with the reset: :class:`~pykvm.debug.planted.Ordered`.
        """
        self.told.clear()
        self.planted.settle()
        if not planted:
            self.planted.put_back()

    # ---- called while a run is on, in the vCPU's thread ------------------------------------------

    def struck(self, index: int) -> Stop | None:
        """An IN that may be a planted stop: a Stop, or None for the guest to go on."""
        cpu = self.cpus[index]
        address = self.address(cpu)
        gpa = self.gpa(cpu, address)
        if gpa is None or not self._is_stop(gpa):
            cpu._runner.pass_on()
            return None
        take_back = _in_of(cpu)
        cpu._runner.complete()
        take_back()
        return self._strike_at(cpu, gpa, address)

    def before_in(self, index: int) -> Callable[[], None] | None:
        """What takes back the IN of a planted stop, once that is complete; None: of the guest."""
        cpu = self.cpus[index]
        gpa = self.gpa(cpu, self.address(cpu))
        return _in_of(cpu) if gpa is not None and self._is_stop(gpa) else None

    def _is_stop(self, gpa: int) -> bool:
        return self.planted.stops_at(gpa) or self.planted.was_at(gpa)

    def _strike_at(self, cpu: Cpu, gpa: int, address: int) -> Stop | None:
        wanted = None
        for strike in list(self._at_gpa.get(gpa, ())):
            stop = strike(cpu, address)
            if stop is not None and (wanted is None or stop.reason == BREAKPOINT):
                wanted = stop
        if wanted is None and gpa in self._at_gpa:
            return Stop(AGAIN, cpu.index, address)
        return wanted

    def exit(self, index: int, exit: Any) -> Any:
        """A debug exit or a shutdown: a Stop, None to go on, or False if it is not ours."""
        cpu = self.cpus[index]
        if exit.reason == kvm.KVM_EXIT_SHUTDOWN:
            return self._shutdown(cpu)
        if index not in self._looks and not self._armed.get(index, (0,))[0]:
            return False
        address = self.address(cpu)
        look = self._looks.get(index)
        for point in self.breakpoints:
            if look is None and point.way == probe.HARDWARE and point.address == address:
                return Stop(BREAKPOINT, index, address, point)
        watched = [point for point in self.watchpoints if point.way == probe.WATCH]
        if watched and exit.dr6 & 0xF:
            hit = (exit.dr6 & 0xF).bit_length() - 1
            number = hit - sum(point.way == probe.HARDWARE for point in self.breakpoints)
            if 0 <= number < len(watched):
                return Stop(WATCHPOINT, index, address, watched[number])
        if look is None:
            return None
        cpu._runner.c.exit_limit = cpu._runner.c.exits + 1  # a step is no exit to be served
        stop = self._stepped(cpu, look)
        if stop is None and self.obstacle(probe.STEP_ON, cpu):
            self._arm(cpu, step=True)
        return stop

    def _is_excused(self, cpu: Cpu, gpa: int) -> bool:
        """Whether it fell over a stop that another one took away; once, for it may be its own."""
        if len(self.cpus) == 1 or (cpu.index, gpa) in self._excused:
            return False
        self._excused.add((cpu.index, gpa))
        return self.planted.was_at(gpa)

    def _shutdown(self, cpu: Cpu) -> Any:
        """Whether a guest without an IDT fell over a planted stop: IN is not permitted to it."""
        address = self.address(cpu)
        gpa = self.gpa(cpu, address)
        if gpa is None or not (self.planted.stops_at(gpa) or self._is_excused(cpu, gpa)):
            return False
        cpu._forget_history()
        return self._strike_at(cpu, gpa, address)


def _in_of(cpu: Cpu) -> Callable[[], None]:
    """What takes an IN back. KVM finishes it on re-entry only: let it, and call that."""
    regs = cpu.load_regs()
    rip, rax = regs.rip, regs.rax

    def take_back() -> None:
        regs = cpu.load_regs()
        regs.rip, regs.rax = rip, rax
        cpu.dirty(REGS)

    return take_back


def _check_address(address: int) -> None:
    if not 0 <= address < 1 << 64:
        raise ValueError(f"{address:#x} is no linear address")
