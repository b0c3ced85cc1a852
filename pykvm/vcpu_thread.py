"""The run state machine of one vCPU: drive the C loop, and serve what it hands to Python.

One exit, from end to end: ``pykvm_vcpu_answer`` (``csrc/vcpu_loop.c``) runs KVM_RUN, looks the
address up (``csrc/bus.c``) and either serves it there and goes on, or returns; an access for a
handler is then given to it by ``csrc/dispatch.c``, everything else comes back to :class:`Runner`.
"""

from __future__ import annotations

import errno
import time
from _operator import index  # `operator` itself costs an import
from _thread import get_ident

from pykvm import result as reasons
from pykvm._abi import _cpython, ffi, lib
from pykvm.errors import BusyError, ClosedError, KvmError
from pykvm.kvm import ioctl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.debug.debugger import Debugger
    from pykvm.debug.stops import Stop
    from pykvm.devices.access import Access
    from pykvm.devices.bus import Bus
    from pykvm.devices.claim import Handler
    from pykvm.kvm import Vcpu

NEVER = (1 << 63) - 1
"""The deadline (CLOCK_MONOTONIC, ns) of a run without one."""
UNLIMITED = (1 << 64) - 1
"""The exit limit of a run without one."""

RESERVED: int = lib.PYKVM_RESERVED
"""The owner of a vCPU that a thread is about to run."""


class End:
    """Why one vCPU's part of a run ended; ``Machine`` makes the ``RunResult`` of it."""

    __slots__ = ("code", "exit", "raised", "reason")

    def __init__(
        self,
        reason: str,
        exit: Any = None,
        code: int | None = None,
        raised: BaseException | None = None,
    ) -> None:
        self.reason = reason
        self.exit = exit
        self.code = code
        self.raised = raised


class Runner:
    """One vCPU and its side of the C loop (``struct pykvm_vcpu``).

    Args:
        vcpu: the vCPU, open as long as this is used.
        index: its number, for records.
        slots: the machine's table of handlers.
        buses: (pio, mmio).
        hooks: handlers of other exits, by exit reason; see ``Machine.on_hlt`` and its like.
        msrs: handlers of MSR accesses, by MSR.
        sync_regs: whether KVM has KVM_CAP_SYNC_REGS.
    """

    def __init__(
        self,
        vcpu: Vcpu,
        index: int,
        slots: list[Handler],
        buses: tuple[Bus, Bus],
        hooks: dict[int, Callable[[Any], object]],
        msrs: dict[int, Callable[[Any], object]],
        sync_regs: bool,
    ) -> None:
        self.vcpu = vcpu
        self._page = page = vcpu.kvm_run  # C has a bare pointer to it
        self._slots = slots
        self._buses = buses
        self._hooks = hooks
        self._msrs = msrs
        self.debug: Debugger | None = None
        self.log: Any = None  # what records or replays it: pykvm.replay
        self.c = c = ffi.new("struct pykvm_vcpu *")
        self.address = int(ffi.cast("uintptr_t", c))
        c.run = page
        c.fd = vcpu.fd
        c.index = index
        c.enter = _ENTER
        c.sync_regs = sync_regs
        c.exit_limit = UNLIMITED
        c.deadline = NEVER
        for bus in buses:
            bus.attach(c)

    @property
    def owner(self) -> int:
        """Ident of the thread that runs it, RESERVED, or 0."""
        owner: int = self.c.owner
        return owner

    @owner.setter
    def owner(self, ident: int) -> None:
        self.c.owner = ident

    def stop(self) -> None:
        """End the run, or if there is none the next one. From any thread, also a handler."""
        page = self._page  # held, so that another thread's close() cannot take it from under C
        if page is not None:
            lib.pykvm_vcpu_stop(self.c)

    def close(self) -> None:
        """Close the vCPU and let go of its run page."""
        self.c.fd = -1
        self.vcpu.close()
        self._page = None

    def forget_stop(self) -> None:
        """Take a stop back that came too late for the run it was meant for."""
        self.c.stop = 0  # immediate_exit may stay: without `stop` it only makes KVM_RUN look again

    def forget_reservation(self) -> None:
        """The thread that it was reserved for is here, and will look at it before it runs."""
        if self.owner == RESERVED:
            self.owner = 0

    def give_back(self) -> None:
        """Have the next run hand out again what this one handed out and nobody looked at."""
        access = self.c.access
        if access.pending == lib.PYKVM_UNANSWERED:
            access.pending = lib.PYKVM_RETRY
        elif access.pending == lib.PYKVM_HANDED:
            access.pending = lib.PYKVM_UNSERVED

    @property
    def halted(self) -> bool:
        """Whether its last exit was a HLT that the next run hands out again."""
        c = self.c
        return bool(
            c.access.pending == lib.PYKVM_UNSERVED and c.run.exit_reason == lib.KVM_EXIT_HLT
        )

    def halt(self) -> None:
        """Have the next run begin with a HLT that it executed: see :attr:`halted`."""
        c = self.c
        c.run.exit_reason, c.error = lib.KVM_EXIT_HLT, 0
        c.access.pending = lib.PYKVM_UNSERVED

    def run(self, deadline: int, max_exits: int | None, lock: Any = None) -> End:
        """Run until something ends it. What handlers raise comes through.

        Args:
            deadline: CLOCK_MONOTONIC in ns, or NEVER.
            max_exits: how many exits this run may make, or None.
            lock: taken around every handler, where several vCPUs share them.
        """
        c = self.c
        owner = c.owner
        if owner and owner != RESERVED:
            raise self._busy()
        page = self._page  # held, so that another thread's close() cannot take it from under C
        if page is None:
            raise ClosedError("this vcpu is closed")
        me = get_ident()
        try:
            # Inside, for a signal's handler may raise as soon as C is back.
            self._begin(lib.pykvm_vcpu_begin(c, deadline))
            c.exit_limit = UNLIMITED if max_exits is None else min(c.exits + max_exits, UNLIMITED)
            c.trace = ioctl.tracing()
            c.run.kvm_valid_regs = 0  # registers cost an exit nothing until a handler asks for them
            return self._loop(lock)
        finally:
            if c.owner == me:  # no calls up to the end: nothing can raise in between
                c.owner = 0
                c.stop = 0
            lib.pykvm_vcpu_end(c)
            del page

    def _busy(self) -> BusyError:
        return BusyError(f"cpu {self.c.index} is running already: stop() it first")

    def _begin(self, error: int) -> None:
        if error == -errno.EBUSY:
            raise self._busy()
        if error == -errno.EEXIST:
            raise KvmError("sigaction", -error, _KICK_TAKEN)
        if error:
            raise KvmError("timer_create", -error)
        self.c.owner = get_ident()

    def _loop(self, lock: Any) -> End:
        vcpu, handlers = self.address, self._slots
        call: Any = None
        if lock is not None:

            def call(handler: Handler, access: Access) -> Any:
                return self._call(lock, handler, access)

        while True:
            try:
                end = self._other(_cpython.run(vcpu, handlers, call), lock)
            except BaseException:  # maybe a signal's handler raised it: the exit is unseen then
                self.give_back()
                raise
            if end is not None:
                if self.c.access.pending == lib.PYKVM_SEEN:  # and ended the run: that is to be told
                    self.c.access.pending = lib.PYKVM_HANDED
                return end

    def _call(self, lock: Any, function: Callable[..., object], *arguments: Any) -> Any:
        access = self.c.access
        if lock is None:
            if access.pending == lib.PYKVM_HANDED:
                access.pending = lib.PYKVM_SEEN
            return function(*arguments)
        called = False
        try:
            with lock:
                called = True
                if access.pending == lib.PYKVM_HANDED:
                    access.pending = lib.PYKVM_SEEN
                return function(*arguments)
        except BaseException:
            # Ctrl-C while another vCPU's handler ran
            if not called and access.pending == lib.PYKVM_ASKED:
                access.pending = lib.PYKVM_RETRY
            raise

    def _other(self, outcome: int, lock: Any) -> End | None:
        """Everything but an access for a handler: None to go on."""
        c = self.c
        if outcome == lib.PYKVM_INTERRUPTED:
            return None  # back in Python bytecode, so Python has run its signal handlers
        if outcome == lib.PYKVM_EXIT:
            return self._exit(lock)
        if outcome == lib.PYKVM_TRACED:
            c.trace = ioctl.tracing()
            if c.trace:
                from pykvm.kvm.tracing import log_run

                log_run(self.vcpu, -c.error)
            return None
        if outcome == lib.PYKVM_STRUCK:
            if self.debug is None:
                self.pass_on()
                return None
            return _stopped(self._call(lock, self.debug.struck, c.index))
        if outcome == lib.PYKVM_FULL:
            claim = self._claim()
            if claim is not None and claim.drains:
                self._call(lock, claim.device.drain)
                return self._cut_short()  # C comes to look only once there is room
            return None  # else it was released meanwhile, and C finds who serves it now
        if outcome in _LOGGED:
            return self._call(lock, self.log.see, outcome)  # type: ignore[no-any-return]
        if outcome == lib.PYKVM_UNCLAIMED:
            return End(reasons.UNCLAIMED, self.access())
        if outcome == lib.PYKVM_STOPPED:
            claim = self._claim()
            return End((claim and claim.tag) or reasons.STOPPED, self.access(), c.access.value)
        if outcome == lib.PYKVM_FAILED:
            if c.error == errno.EINVAL and c.run.kvm_dirty_regs:
                return End(reasons.FAILED_ENTRY)  # the state handed in was refused
            ioctl.fail(self.vcpu, "KVM_RUN", c.error)
        return End(_OUTCOMES[outcome])

    def _cut_short(self) -> End | None:
        """Whether the run is to end though the guest was not entered."""
        c = self.c
        if c.stop:
            return End(reasons.STOPPED)
        if time.clock_gettime_ns(time.CLOCK_MONOTONIC) >= c.deadline:
            return End(reasons.TIMEOUT)
        return None

    def _exit(self, lock: Any) -> End | None:
        from pykvm.kvm.exits import decode

        run = self.c.run
        reason = run.exit_reason
        exit: Any = decode(run)
        if reason in _MSR and exit.index in self._msrs:
            self._msr(exit, self._call(lock, self._msrs[exit.index], exit))
            return None
        if self.debug is not None and reason in _DEBUG:
            stop = self._call(lock, self.debug.exit, self.c.index, exit)
            if stop is not False:
                return _stopped(stop)
        hook = self._hooks.get(reason)
        # What is fatal repeats if it is simply re-run: its hook must have set registers.
        if (
            hook is not None
            and self._call(lock, hook, exit) is not False
            and (reason not in _FATAL or run.kvm_dirty_regs)
        ):
            return None
        return End(_EXITS.get(reason, reasons.OTHER_EXIT), exit)

    def _msr(self, exit: Any, answer: Any) -> None:
        if answer is False or (answer is None and not exit.is_write):
            self.vcpu.complete_msr(error=1)
        elif exit.is_write:
            self.vcpu.complete_msr()
        elif hasattr(answer, "__index__") and 0 <= (value := index(answer)) < 1 << 64:
            self.vcpu.complete_msr(value)
        else:
            raise ValueError(
                f"the handler of MSR {exit.index:#x} answered {answer!r}: no 64-bit int"
            )

    def _claim(self) -> Any:
        access = self.c.access
        return self._buses[access.is_mmio].find(access.address)

    @property
    def unseen(self) -> bool:
        """Whether an exit waits that nobody has looked at: the next run hands it out."""
        return self.c.access.pending in (
            lib.PYKVM_UNSERVED,
            lib.PYKVM_RETRY,
            lib.PYKVM_UNANSWERED,
        )

    def pass_on(self) -> None:
        """What looked like a planted stop is an IN of the guest's own: have it served."""
        self.c.access.pending = lib.PYKVM_UNSERVED
        self.c.guests_own = 1

    def access(self) -> Access:
        """The access being served, as a value of its own."""
        return _cpython.last_access(self.address)

    def complete(self, given_up: Callable[[int], object] | None = None) -> None:
        """Let KVM finish the instruction of the last exit, without running the guest further.

        PIO and MMIO take effect on re-entry only (api.rst, the note on KVM_EXIT_IO in 5.): until
        then RIP may still point at the instruction, and its result is missing.

        Args:
            given_up: called with the outcome that a run would have seen to, and nobody does now.
        """
        c = self.c
        me = get_ident()
        if self.owner == me:  # a handler gives its own vCPU a new state
            deadline = c.deadline
            self._complete(c, given_up)
            c.deadline = deadline
            c.run.immediate_exit = 1  # its beat or a stop may have been lost on us: look again
            return
        if self.owner:  # also one that a thread is about to run
            raise self._busy()
        page = self._page
        if page is None or (not c.entries and c.access.pending == lib.PYKVM_IDLE):
            return
        try:
            self._begin(lib.pykvm_vcpu_begin(c, NEVER))
            self._complete(c, given_up)
        finally:
            if self.owner == me:
                self.owner = 0
            lib.pykvm_vcpu_end(c)
            del page

    def _complete(self, c: Any, given_up: Callable[[int], object] | None) -> None:
        run = lib.pykvm_vcpu_run
        limit, c.exit_limit, c.deadline, c.trace = c.exit_limit, UNLIMITED, NEVER, 0
        log = c.log
        if log and log.mode == lib.PYKVM_LOG_REPLAY:
            c.log = ffi.NULL  # it has given its answer
        stopped, take_back = False, _nothing
        try:
            while True:
                c.run.immediate_exit = 1
                outcome = run(c)
                if given_up is not None:
                    given_up(outcome)
                if outcome == lib.PYKVM_FULL:
                    c.access.pending = lib.PYKVM_UNANSWERED  # nobody made room: it is given up
                elif outcome == lib.PYKVM_FAILED and c.run.kvm_dirty_regs & lib.KVM_SYNC_X86_SREGS:
                    c.run.kvm_dirty_regs &= ~lib.KVM_SYNC_X86_SREGS  # refused, and in the way
                elif outcome == lib.PYKVM_LOGGED:
                    self.log.see(outcome)
                elif outcome == lib.PYKVM_STRUCK:  # Ctrl-C came before anybody saw it
                    found = None if self.debug is None else self.debug.before_in(c.index)
                    if found is None:
                        self.pass_on()
                    take_back = found or _nothing
                elif outcome in (lib.PYKVM_KICKED, lib.PYKVM_INTERRUPTED, lib.PYKVM_FAILED):
                    stopped |= outcome == lib.PYKVM_KICKED  # meant for a run
                    if c.access.pending == lib.PYKVM_RETRY:
                        continue  # more items of a string instruction
                    if stopped:
                        c.stop = lib.PYKVM_STOP_OTHER
                    take_back()
                    return
        finally:
            c.exit_limit, c.log = limit, log


def _nothing() -> None:
    """What there is to take back of most exits."""


def _stopped(stop: Stop | None) -> End | None:
    return None if stop is None else End(stop.reason, stop)


_ENTER = ffi.addressof(lib, "pykvm_vcpu_enter")
_KICK_TAKEN = (
    f"signal {lib.pykvm_kick_signal()} (SIGRTMIN+5) has a handler already; pykvm needs it to get"
    " vCPUs out of the guest"
)
_OUTCOMES = {
    lib.PYKVM_LIMIT: reasons.LIMIT,
    lib.PYKVM_TIMEOUT: reasons.TIMEOUT,
    lib.PYKVM_KICKED: reasons.STOPPED,
}
_LOGGED = (lib.PYKVM_LOGGED, lib.PYKVM_REPLAYED, lib.PYKVM_DIVERGED)
_MSR = (lib.KVM_EXIT_X86_RDMSR, lib.KVM_EXIT_X86_WRMSR)
_FATAL = (lib.KVM_EXIT_SHUTDOWN, lib.KVM_EXIT_FAIL_ENTRY, lib.KVM_EXIT_INTERNAL_ERROR)
_DEBUG = (lib.KVM_EXIT_DEBUG, lib.KVM_EXIT_SHUTDOWN)
_EXITS = {
    lib.KVM_EXIT_HLT: reasons.HALTED,
    lib.KVM_EXIT_SHUTDOWN: reasons.SHUTDOWN,
    lib.KVM_EXIT_FAIL_ENTRY: reasons.FAILED_ENTRY,
    lib.KVM_EXIT_INTERNAL_ERROR: reasons.INTERNAL_ERROR,
}
