"""A HLT that KVM told of as a step is executed once more: what may come before it is, is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pykvm import kvm
from pykvm import result as reasons
from pykvm.debug.stepping import Stepping
from pykvm.debug.stops import HALTED, LIMIT, STEP, Stop
from pykvm.memory import GuestMemory
from pykvm.vcpu_thread import End

HLT_AT, DEADLINE = 0x1000, 77


class Guest:
    """A machine with one vCPU, at a HLT, of which what runs is scripted.

    Attributes:
        runs: of every run, what KVM was to stop at, RIP before it, and its limits.
    """

    def __init__(self, memory: GuestMemory, then: str) -> None:
        self._then = then
        self.regs = SimpleNamespace(rip=HLT_AT)
        self.debug = 0
        self.runs: list[tuple[int, int, int, int | None]] = []
        self.cpu: Any = SimpleNamespace(
            index=0,
            vcpu=SimpleNamespace(set_guest_debug=self._set_guest_debug),
            load_regs=lambda: self.regs,
            load_sregs=lambda: SimpleNamespace(
                cr0=1, cr3=0, cr4=0, efer=0, cs=SimpleNamespace(base=0, l=0)
            ),
            dirty=lambda which: None,
            _runner=SimpleNamespace(c=SimpleNamespace()),
        )
        machine: Any = SimpleNamespace(
            cpus=(self.cpu,),
            memory=memory,
            irqchip=None,
            vm=SimpleNamespace(check_extension=lambda name: 0),
        )
        self.stepping = Stepping(machine, lambda: None)

    def _set_guest_debug(self, control: int, registers: Any = ()) -> None:
        self.debug = control

    def go(self, cpus: list[Any], deadline: int, max_exits: int | None) -> tuple[Any, Any]:
        """As a machine runs: the step first, in which KVM emulates the HLT; and then ``then``."""
        self.runs.append((self.debug, self.regs.rip, deadline, max_exits))
        if len(self.runs) == 1:
            self.regs.rip += 1
            stop = self.stepping._stepped(self.cpu, self.stepping._looks[0])
            assert stop is not None
            return self.cpu, End(stop.reason, stop)
        if self._then in (HALTED, LIMIT):
            self.regs.rip += 1
        return self.cpu, End(self._then)

    def step(self) -> Any:
        return self.stepping._single_step(
            self.cpu, DEADLINE, lambda cpu: Stop(STEP, 0, self.regs.rip), self.go
        )


@pytest.mark.parametrize(
    ("then", "reason", "rip"),
    [
        (HALTED, HALTED, HLT_AT + 1),
        (LIMIT, HALTED, HLT_AT + 1),
        (reasons.TIMEOUT, reasons.TIMEOUT, HLT_AT),
        (reasons.STOPPED, reasons.STOPPED, HLT_AT),
        (reasons.INTERRUPTED, reasons.INTERRUPTED, HLT_AT),
    ],
)
def test_a_timeout_before_the_hlt_is_executed_again_is_a_timeout(
    then: str, reason: str, rip: int
) -> None:
    with GuestMemory(0x2000) as memory:
        memory.write(HLT_AT, b"\xf4")
        guest = Guest(memory, then)
        end = guest.step()
        assert (end.reason, guest.regs.rip) == (reason, rip)
        stepped = kvm.KVM_GUESTDBG_ENABLE | kvm.KVM_GUESTDBG_SINGLESTEP
        # The second time it is not stepped: KVM is to halt, and to be rid of the wish.
        assert guest.runs == [(stepped, HLT_AT, DEADLINE, 1), (0, HLT_AT, DEADLINE, 1)]
        assert guest.debug == 0
        if reason == HALTED:
            assert isinstance(end.exit, Stop) and end.exit.address == HLT_AT + 1
