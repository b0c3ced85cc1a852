"""Single steps, by KVM where it can, else by stops at every instruction that may come next."""

from __future__ import annotations

import time

from pykvm import kvm
from pykvm.debug import probe, stops
from pykvm.debug.planted import Planted
from pykvm.debug.stops import AGAIN, BREAKPOINT, HALTED, LIMIT, STEP, WATCHPOINT, Breakpoint, Stop
from pykvm.errors import CapabilityError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pykvm.cpu import Cpu
    from pykvm.debug.stops import Watchpoint
    from pykvm.debugging import Debugging

    Look = Callable[[Cpu], "Stop | None"]
    Go = Callable[[list[Cpu], int, int | None], tuple[Cpu, Any]]
    Strike = Callable[[Cpu, int], "Stop | None"]

REGS = 1
"""KVM_SYNC_X86_REGS, as ``Cpu.dirty`` takes it."""
REGISTERS = 4
"""Debug registers of a processor (SDM Vol. 3B §18.2)."""
LENGTHS = {1: 0, 2: 1, 4: 3, 8: 2}
"""DR7.LEN of so many bytes."""
_ACCESS = {"x": 0, "w": 1, "rw": 3}
_HLT = 0xF4
_A_WHILE = 1_000_000
"""Nanoseconds for a jump to itself, where that cannot be stepped."""
TURN = 32
"""Steps of one of several vCPUs before it is the next one's turn."""


class Stepping:
    """The half of a :class:`~pykvm.debug.debugger.Debugger` that makes single steps.

    Args:
        machine: the machine.
        make: makes a small machine on the same KVM, for :mod:`pykvm.debug.probe`.
    """

    def __init__(self, machine: Debugging, make: Callable[[], Any]) -> None:
        self._machine = machine
        self._make = make
        self.cpus: tuple[Cpu, ...] = machine.cpus
        self.planted = Planted(machine.memory, [cpu._runner.c for cpu in machine.cpus])
        self.breakpoints: list[Breakpoint] = []
        self.watchpoints: list[Watchpoint] = []
        self._at_gpa: dict[int, list[Strike]] = {}
        self._armed: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._looks: dict[int, Look] = {}  # after each single step of a vCPU
        self._before: dict[int, int] = {}  # where it stood before that
        offered = machine.vm.check_extension("KVM_CAP_SET_GUEST_DEBUG2")
        self._blocked = int(kvm.KVM_GUESTDBG_BLOCKIRQ & offered)  # interrupts, while it is stepped

    def obstacle(self, way: str, cpu: Cpu) -> str:
        """Why ``cpu``, in the mode that it is in, cannot be stopped in a way: "" if it can."""
        mode = probe.mode_of(cpu.load_sregs())
        return probe.obstacle(way, mode, self._make, self._machine.kvm.path)

    def gpa(self, cpu: Cpu, address: int) -> int | None:
        """Guest-physical address of a linear one, in RAM, or None."""
        from pykvm.arch.x86_64.walk import translate

        found = translate(self._machine.memory, cpu.load_sregs(), address)
        if found is None or not self._machine.memory.covers(found):
            return None
        return found

    @staticmethod
    def address(cpu: Cpu) -> int:
        """Linear address of the next instruction."""
        rip: int = cpu.load_regs().rip
        sregs = cpu.load_sregs()
        return _linear(rip, sregs)

    def plant(self, gpa: int, strike: Strike) -> None:
        """Have ``strike(cpu, address)`` called when a vCPU comes to ``gpa``: a Stop, or None."""
        self.planted.plant(gpa)
        self._at_gpa.setdefault(gpa, []).append(strike)

    def unplant(self, gpa: int, strike: Strike) -> None:
        """The end of that."""
        self._at_gpa[gpa].remove(strike)
        if not self._at_gpa[gpa]:
            del self._at_gpa[gpa]
        self.planted.remove(gpa)

    def _is_wanted(self, cpu: Cpu, end: Any) -> bool:
        """Whether one of those who wanted to stop there still does, now that it can be asked."""
        stop = end.exit if isinstance(end.exit, Stop) else None
        if stop is None or stop.point is None or stop.asked:
            return True
        return self._ask(cpu, stop, self._points_of(stop))

    def _ask(self, cpu: Cpu, stop: Stop, points: Sequence[Any]) -> bool:
        wanted = [point for point in points if self._holds(point, cpu)]
        if not wanted:
            return False
        stop.point = wanted[0]
        for point in wanted:
            point.hits += 1
            if isinstance(point, Breakpoint) and point.once:
                point.delete()
        return True

    def _points_at(self, cpu: Cpu, address: int) -> list[Breakpoint]:
        """The breakpoints at a place, the latest first."""
        gpa = self.gpa(cpu, address)
        return [
            point
            for point in reversed(self.breakpoints)
            if point.address == address or (gpa is not None and point.gpa == gpa)
        ]

    def _points_of(self, stop: Stop) -> list[Any]:
        """The watchpoint; or all breakpoints at that place, the latest first."""
        if stop.reason != BREAKPOINT:
            return [stop.point]
        gpa = stop.point.gpa
        return [
            point
            for point in reversed(self.breakpoints)
            if point is stop.point
            or point.address == stop.address
            or (gpa is not None and point.gpa == gpa)
        ]

    @staticmethod
    def _holds(point: Any, cpu: Cpu) -> bool:
        condition = getattr(point, "condition", None)
        if condition is None or condition(cpu):
            return True
        point.passed += 1
        return False

    # ---- steps -----------------------------------------------------------------------------------

    def _walk(self, cpu: Cpu, deadline: int, look: Look, go: Go, *, turn: bool = False) -> Any:
        """Step one vCPU until ``look`` gives a Stop after a step, or something else ends it.

        A stop that is planted where the vCPU stands is stepped over; those on the way stop it.
        One with reason AGAIN ends a ``turn``, and else nothing.
        """
        look = self._arrive(look)
        over = True
        while True:
            problem = self.obstacle(probe.STEP, cpu)
            if problem:
                reason = self.cannot_decode(cpu)
                if reason:
                    mode = probe.mode_of(cpu.load_sregs())
                    raise CapabilityError(f"no single step in {mode}: {problem}; {reason}")
                end = self._step_by_planting(cpu, deadline, go)
                if end.reason in (AGAIN, BREAKPOINT):
                    end = look(cpu)
            else:
                here = self.gpa(cpu, self.address(cpu)) if self.planted and over else None
                if here is not None and here in self.planted:
                    with self.planted.lifted([here]):
                        end = self._single_step(cpu, deadline, _once, go)
                    if end.reason == STEP:
                        end = look(cpu)
                else:
                    end = self._single_step(cpu, deadline, look, go)
            over = end is not None
            if end is None or (end.reason == AGAIN and not turn):
                continue
            if end.reason == AGAIN or self._is_wanted(cpu, end):
                return end

    def _arrive(self, look: Look) -> Look:
        """``look``, and then at the breakpoints where the step has led, in whatever way they stop.

        So none of them is executed; where no condition holds it is stepped over.
        """

        def arrived(cpu: Cpu) -> Stop | None:
            stop = look(cpu)
            if not self.breakpoints or not (stop is None or stop.reason in (STEP, AGAIN)):
                return stop
            here = self.address(cpu)
            points = self._points_at(cpu, here)
            if not points:
                return stop
            at = Stop(BREAKPOINT, cpu.index, here, points[0])
            at.asked = True
            return at if self._ask(cpu, at, points) else stop or Stop(AGAIN, cpu.index, here)

        return arrived

    def _single_step(self, cpu: Cpu, deadline: int, look: Look, go: Go) -> Any:
        """KVM's single steps, until ``look`` gives a Stop after one or something else ends them.

        KVM loses a step that goes through user space: one over a write to a device or a port that
        it emulates, and every one whose handler sets registers (kvm_set_rflags() keeps TF only
        where it was set). So such an exit is served and the guest not entered again. Some lose all
        steps behind an instruction that they emulate, a MOV from CR4 for example, with no exit to
        tell of it (x86_emulate_instruction() puts RFLAGS back without TF): see Debugger.exit().
        """
        index = cpu.index
        self._looks[index] = look
        self._before[index] = self.address(cpu)
        try:
            while True:
                self._arm(cpu, step=True)
                _, end = go([cpu], deadline, 1)
                if end.reason != LIMIT:
                    if end.reason == HALTED and isinstance(end.exit, Stop):  # told as a step
                        return self._have_halted(cpu, end, deadline, go)
                    return end
                if self.address(cpu) != self._before[index]:
                    # Complete, but for what KVM does before it enters the guest.
                    cpu._runner.complete()
                    stop = self._stepped(cpu, look)
                    if stop is not None:
                        return stop
        finally:
            del self._looks[index]
            self._arm(cpu)

    def _have_halted(self, cpu: Cpu, end: Any, deadline: int, go: Go) -> Any:
        """Execute a HLT again that was told of as a step, unstepped.

        The KVM that emulated it still means to halt, and would after whatever it emulates next:
        a later run would end there, as "halted" (kvm-pvm; ``halt_request`` in KVM's x86.c).
        """
        cpu.load_regs().rip -= 1
        cpu.dirty(REGS)
        unarmed = 0, (0,) * 8
        cpu.vcpu.set_guest_debug(*unarmed)
        self._armed[cpu.index] = unarmed
        _, again = go([cpu], deadline, 1)
        # A timeout or a stop may come before it: then it stands at its HLT, and has not halted.
        return end if again.reason in (HALTED, LIMIT) else again

    def cannot_decode(self, cpu: Cpu) -> str:
        """Why instructions cannot be told apart here: "" if they can."""
        from pykvm.debug import disassembly

        return self.obstacle(probe.PORT, cpu) or disassembly.missing()

    def _step_by_planting(self, cpu: Cpu, deadline: int, go: Go) -> Any:
        """One step where there are no single steps: a stop at every instruction that may be next.

        Returns: an end with reason AGAIN for a step, or what else came.
        """
        from pykvm.debug.disassembly import successors

        self.planted.settle()
        here = self.address(cpu)
        gpas = {self.gpa(cpu, next) for next in successors(cpu, self._machine.memory, self.planted)}
        at = self.gpa(cpu, here)

        def strike(cpu: Cpu, address: int) -> Stop:
            return Stop(AGAIN, cpu.index, address)

        if gpas == {at}:  # a jump to itself: after it the guest is where it was
            until = min(deadline, time.clock_gettime_ns(time.CLOCK_MONOTONIC) + _A_WHILE)
            with self.planted.lifted([] if at is None else [at]):
                _, end = go([cpu], until, None)
            if end.reason == stops.TIMEOUT and until < deadline:
                return Stop(AGAIN, cpu.index, here)
            return end
        planted = [gpa for gpa in gpas if gpa is not None and gpa != at]
        for gpa in planted:
            self.plant(gpa, strike)
        try:
            with self.planted.lifted([] if at is None else [at]):
                self._arm(cpu)
                _, end = go([cpu], deadline, None)
        finally:
            for gpa in planted:
                self.unplant(gpa, strike)
        return end

    def _walk_together(
        self, cpus: Sequence[Cpu], deadline: int, points: Sequence[Watchpoint], go: Go
    ) -> tuple[Cpu, Any]:
        """Step vCPUs, one at a time, until one meets a breakpoint or changes what is watched.

        As no other runs meanwhile, it is known who has written. One that has halted waits for the
        rest, as in any run.
        """
        look = self._watch_by_steps(points)
        halted: list[Cpu] = []
        try:
            while True:
                for cpu in cpus:
                    if cpu in halted:
                        continue
                    for point in points:  # as its own page tables show it
                        point.value = self._bytes(cpu, point)
                    if len(cpus) == 1:
                        return cpu, self._walk(cpu, deadline, look, go)
                    end = self._walk(cpu, deadline, _for_a_turn(look), go, turn=True)
                    if end.reason == HALTED:
                        halted.append(cpu)
                    if len(halted) == len(cpus):
                        halted.clear()
                        return cpu, end
                    if end.reason not in (AGAIN, HALTED):
                        return cpu, end
        finally:
            for cpu in halted:
                self._halt_again(cpu)

    def _halt_again(self, cpu: Cpu) -> None:
        """Have the next run find a vCPU halted that has been so in this one."""
        cpu._runner.give_back()
        if not cpu._runner.halted:  # its HLT was a step, and is complete
            cpu.load_regs().rip -= 1
            cpu.dirty(REGS)

    def _watch_by_steps(self, points: Sequence[Watchpoint]) -> Look:
        def look(cpu: Cpu) -> Stop | None:
            address = self.address(cpu)
            for point in points:
                now = self._bytes(cpu, point)
                if now != point.value:
                    old, point.value = point.value, now
                    return Stop(WATCHPOINT, cpu.index, address, point, old, now)
            return None

        return look

    def _bytes(self, cpu: Cpu, point: Watchpoint) -> bytes:
        from pykvm.arch.x86_64.walk import read_virtual

        return read_virtual(self._machine.memory, cpu.load_sregs(), point.address, point.length)

    # ---- KVM_SET_GUEST_DEBUG ---------------------------------------------------------------------

    def _arm(self, cpu: Cpu, step: bool = False) -> None:
        """Tell KVM what is to stop this vCPU, if that has changed."""
        control, registers = 0, [0] * 8
        number = 0
        points: list[tuple[Any, str, int]] = [
            (point, "x", 1) for point in self.breakpoints if point.way == probe.HARDWARE
        ]
        if step:
            control |= kvm.KVM_GUESTDBG_SINGLESTEP | self._blocked
            points = [each for each in points if each[0].address != self.address(cpu)]
        points += [(p, p.access, p.length) for p in self.watchpoints if p.way == probe.WATCH]
        for point, access, length in points[:REGISTERS]:
            registers[number] = point.address
            registers[7] |= 0x400 | 1 << 2 * number
            registers[7] |= (_ACCESS[access] | LENGTHS[length] << 2) << (16 + 4 * number)
            number += 1
        if number:
            control |= kvm.KVM_GUESTDBG_USE_HW_BP
        if control:
            control |= kvm.KVM_GUESTDBG_ENABLE
        wanted = control, tuple(registers)
        if step or self._armed.get(cpu.index, (0, (0,) * 8)) != wanted:
            cpu.vcpu.set_guest_debug(control, registers if number else ())
            self._armed[cpu.index] = wanted

    def _stepped(self, cpu: Cpu, look: Look) -> Stop | None:
        """After a single step: the Stop, if it is to end there."""
        address, before = self.address(cpu), self._before[cpu.index]
        self._before[cpu.index] = address
        # A KVM that emulates the instruction tells of the step, and no longer of the halt.
        if address == before + 1 and self._machine.irqchip is None:
            gpa = self.gpa(cpu, before)
            if gpa is not None and self._machine.memory[gpa] == _HLT:
                return Stop(HALTED, cpu.index, address)
        return look(cpu)


def _linear(rip: int, sregs: Any) -> int:
    long = sregs.efer & 1 << 10 and sregs.cs.l
    return rip if long else (sregs.cs.base + rip) & 0xFFFFFFFF


def _for_a_turn(look: Look) -> Look:
    left = TURN

    def turn(cpu: Cpu) -> Stop | None:
        nonlocal left
        left -= 1
        return look(cpu) or (None if left > 0 else Stop(AGAIN, cpu.index, Stepping.address(cpu)))

    return turn


def _once(cpu: Cpu) -> Stop:
    return Stop(STEP, cpu.index, Stepping.address(cpu))
