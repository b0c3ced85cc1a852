"""Running a machine: from ``run()`` to the value that says how it ended."""

from __future__ import annotations

import time

from pykvm import result as reasons
from pykvm.errors import BusyError, ClosedError
from pykvm.hooks import Hooks
from pykvm.result import RunResult
from pykvm.vcpu_thread import NEVER, RESERVED, End, Runner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.background import Background
    from pykvm.cpu import Cpu
    from pykvm.debug.debugger import Debugger
    from pykvm.kvm import Kvm
    from pykvm.pc import Pc
    from pykvm.virtio import Attachments


class Runs(Hooks):
    """The runs of a :class:`~pykvm.Machine`, which is this with everything else."""

    kvm: Kvm
    pc: Pc | None
    _background: Background | None
    _closed: bool
    _ending: End | None
    _last: RunResult | None = None
    _runners: list[Runner]
    _running: bool
    _virtio: Attachments | None
    _debugger: Debugger | None = None

    def run(self, timeout: float | None = None, *, max_exits: int | None = None) -> RunResult:
        """Run the vCPUs until something ends the run; again to go on where it ended.

        Every vCPU that was entered runs, each in a thread of its own, the first in the caller's;
        with ``irqchip`` all run. The run ends when every one of them has halted, or as soon as
        one ends for any other reason, which then is the result's.

        Args:
            timeout: seconds, or None for no limit.
            max_exits: exits that each vCPU may make, or None.

        Returns:
            How it ended. A guest's failure does not raise: see ``result.error`` and
            ``result.check()``. Ctrl-C ends it with reason "interrupted".

        Raises:
            Exception: whatever a handler raised, unchanged.
            KvmError: KVM_RUN itself failed.
            BusyError: a vCPU runs already, in another thread.
            ClosedError: the machine is closed.
        """
        cpus = self._cpus_to_run(timeout, max_exits)
        if isinstance(cpus, RunResult):
            return cpus
        if self._running:
            raise self._busy()
        self._running = True  # up to the try no call: neither a thread nor a signal comes between
        try:
            return self._run_them(cpus, timeout, max_exits)
        finally:
            self._running = False

    def start(self, timeout: float | None = None, *, max_exits: int | None = None) -> Background:
        """Run as :meth:`run` does, but in the background: the script goes on at once.

        ::

            with m.start(timeout=60) as running:
                m.console.expect(b"login: ")
                m.console.write(b"root\\n")
                result = running.wait()

        Leaving the ``with`` block, or closing the machine, stops the run.

        Returns:
            The run, to wait for and to stop.

        Raises:
            BusyError, ClosedError: as :meth:`run`; what handlers raise comes from ``wait()``.
        """
        from pykvm.background import Background

        cpus = self._cpus_to_run(timeout, max_exits)
        if isinstance(cpus, RunResult):
            return Background(self, cpus)
        if self._running:
            raise self._busy()
        background = Background(self)
        self._running = True
        try:
            for cpu in cpus:
                cpu._runner.owner = RESERVED
            self._devices_begin()  # here, so that a console can be waited on at once
            self._background = background
            background.begin(lambda: self._run_them(cpus, timeout, max_exits))
        except BaseException:
            if not background.give_up():
                self._devices_ended()
                self._background_ended()
            raise
        return background

    def _devices_begin(self) -> None:
        if self.pc is not None:
            self.pc.run_begins()
        if self._virtio is not None:
            self._virtio.run_begins()

    def _devices_ended(self) -> None:
        """What the guest asked for before the end is done, and nobody waits for more."""
        if self.pc is not None:
            self.pc.run_ended()
        if self._virtio is not None:
            self._virtio.run_ended()

    def _background_ended(self) -> None:
        for runner in self._runners:
            if runner.owner == RESERVED:  # it never came to run
                runner.owner = 0
        self._running = False

    @property
    def running(self) -> bool:
        """Whether it runs now, in whatever thread."""
        return self._running

    def _cpus_to_run(self, timeout: float | None, max_exits: int | None) -> list[Cpu] | RunResult:
        """Check what a run was asked for: the vCPUs for it, or why one of them cannot go on."""
        if self._closed:
            raise ClosedError("this machine is closed")
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout must be seconds of at least 0, not {timeout!r}")
        if max_exits is not None and max_exits < 0:
            raise ValueError(f"max_exits must be at least 0, not {max_exits}")
        cpus = [cpu for cpu in self.cpus if cpu.entered] or [self.cpus[0]]
        if self.irqchip is not None:
            cpus = list(self.cpus)
        for cpu in cpus:
            if cpu.ended:
                return self._still_ended(cpu)
        return cpus

    def _run_them(self, cpus: list[Cpu], timeout: float | None, max_exits: int | None) -> RunResult:
        """A run of these vCPUs; the machine is claimed for it."""
        before = sum(cpu._runner.c.exits for cpu in cpus)
        deadline = NEVER
        if timeout is not None and timeout < 1e9:
            deadline = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + int(timeout * 1e9)
        began = time.monotonic()
        try:
            self._devices_begin()
            if self._debugger is None:
                cpu, end = self._run(cpus, deadline, max_exits)
            else:
                cpu, end = self._debugger.run(cpus, deadline, max_exits, self._run)
        finally:
            self._devices_ended()
        seconds = time.monotonic() - began
        exits = sum(cpu._runner.c.exits for cpu in cpus) - before
        result = RunResult(
            end.reason, exits=exits, seconds=seconds, exit=end.exit, code=end.code, cpu=cpu.index
        )
        if self._virtio is not None:
            result.devices = self._virtio.counters()
        if self.pc is not None:
            result.timings = self.pc.timings(began)
            if self.pc.panic and result.reason in (reasons.TIMEOUT, reasons.SHUTDOWN):
                result.reason = reasons.PANIC  # how a panicked kernel comes to rest is its affair
        if end.reason != reasons.HALTED:
            self._finish(result, cpu, cpus)
        self.pio.drain()
        self.mmio.drain()
        return result

    def _run(self, cpus: list[Cpu], deadline: int, max_exits: int | None) -> tuple[Cpu, End]:
        try:
            if len(cpus) == 1:
                cpu = cpus[0]
                try:
                    end = cpu._runner.run(deadline, max_exits)
                except KeyboardInterrupt:
                    cpu._runner.give_back()  # it may have come as the run ended
                    end = End(reasons.INTERRUPTED)
            else:
                from pykvm.smp import run_together

                cpu, end = run_together(cpus, deadline, max_exits)
        finally:
            if len(self.cpus) > 1:  # stop() was for this run, also where it reached none that ran
                for runner in self._runners:
                    runner.forget_stop()
            ending, self._ending = self._ending, None
        # A debugger makes one run of several: a stop that came at the end of one is for them all.
        partial = self._debugger is not None and end.reason in (reasons.LIMIT, _AGAIN)
        if ending is not None and (end.reason == reasons.STOPPED or partial):
            end = ending
        if end.reason in _FATAL:
            cpu.ended = end.reason
        return cpu, end

    def _finish(self, result: RunResult, cpu: Cpu, cpus: list[Cpu]) -> None:
        """Say why, for every end but a plain halt."""
        if result.reason in reasons.WATCHED:
            result.cpus = tuple(each.state() for each in cpus)
            if self.pc is not None:
                for state in result.cpus:
                    state.symbol = self.pc.symbol(state.rip)
        if self.pc is not None and result.reason in _DOUBTFUL:
            from pykvm.suitability import obstacle

            result.advice = obstacle(self)
        if result.reason in _FATAL:
            from pykvm.diagnose import explain

            result.error = explain(cpu, result.reason, result.exit, result.advice)
        elif not result.ok:
            from pykvm.diagnose import incomplete

            result.error = incomplete(result, cpu)
        self._last = result

    def _still_ended(self, cpu: Cpu) -> RunResult:
        """A triple fault repeats if it is simply re-run; say so again without running."""
        last = self._last
        return RunResult(
            cpu.ended,
            exit=last.exit if last else None,
            error=last.error if last else None,
            cpu=cpu.index,
        )

    def _busy(self) -> BusyError:
        return BusyError("a vCPU of this machine is running: stop() it first")

    def stop(self, reason: str = reasons.STOPPED, code: int | None = None) -> None:
        """End the run: from a handler, or from any thread.

        If nothing runs the next run ends at once.

        Args:
            reason: what ``result.reason`` will be; the first of several stops counts.
            code: what ``result.code`` will be.
        """
        if self._ending is None:
            self._ending = End(reason, code=code)
        for runner in self._runners:
            runner.stop()

    def forget_stop(self) -> None:
        """Take back a stop() that came when nothing ran: the next run goes on."""
        self._ending = None
        for runner in self._runners:
            runner.forget_stop()


_AGAIN = "again"  # pykvm.debug.stops.AGAIN: only a debugger's runs end so
_FATAL = (reasons.SHUTDOWN, reasons.FAILED_ENTRY, reasons.INTERNAL_ERROR)
_DOUBTFUL = (*_FATAL, reasons.TIMEOUT, reasons.UNSUPPORTED)
"""How a stock kernel ends on a KVM that cannot run it."""
