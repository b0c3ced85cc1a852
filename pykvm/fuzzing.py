"""Fuzzing: input after input from the same snapshot, in C (``csrc/fuzz.c``).

A run is: put the input into guest memory, enter the guest, note how it ended, put back what it
changed. Python is asked for what only Python serves, and gets the outcomes of a batch at once.
"""

from __future__ import annotations

import time
from _thread import interrupt_main, start_new_thread
from itertools import islice
from struct import Struct

from pykvm import result as reasons
from pykvm._abi import _cpython, ffi, lib
from pykvm.debug.planted import Ordered
from pykvm.errors import GuestMemoryError
from pykvm.outcome import UNTIL, Outcome, shown
from pykvm.snapshot import devices as devices_of
from pykvm.snapshot.reset import PATIENCE
from pykvm.snapshot_at_rest import plan_of, quiet
from pykvm.vcpu_thread import NEVER, UNLIMITED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from pykvm.debug.coverage import Coverage
    from pykvm.debug.planted import Planted
    from pykvm.machine import Machine
    from pykvm.snapshots import Snapshot

BATCH = 64
"""Inputs that are taken at once; a source of inputs that learns from outcomes lags by so many."""


def fuzz(
    machine: Machine,
    snapshot: Snapshot,
    inputs: Iterable[bytes],
    *,
    write_at: int,
    length_at: int | None = None,
    size: int = 4096,
    until: int | None = None,
    timeout: float | None = 1.0,
    max_exits: int | None = None,
    coverage: tuple[int, int] | Coverage | None = None,
    known: bytearray | None = None,
    exact: bool = True,
    batch: int = BATCH,
) -> Iterator[Outcome]:
    """Run input after input, each from the snapshot on; ``Machine.fuzz`` is this.

    Args:
        machine: with one vCPU.
        snapshot: of it, or of one just like it.
        inputs: bytes, at most ``size`` of them each.
        write_at: guest-physical address that an input is written to, within one region.
        length_at: where its length is written, 8 bytes; None: nowhere.
        size: room at ``write_at``. What a short input leaves over is as in the snapshot.
        until: a port; a write to it ends the run with reason ``"until"``.
        timeout: seconds for one input, or None.
        max_exits: exits for one input, or None.
        coverage: ``(gpa, size)`` of bytes in which the guest counts where it was: a cell with a bit
            that no input before had set is fresh. Or ``m.coverage(blocks)``, which is begun: a
            block that was not reached before is; each costs one exit, once.
        known: the bits seen so far, to go on with; as long as the map.
        exact: put back all of the vCPU but the time, which runs on (with ``irqchip``, where timers
            depend on it, also the time). False: the general and segment registers and pending
            events alone, which is twice as fast, for guests that touch neither FPU nor MSRs.
        batch: inputs taken at once.

    Yields:
        An :class:`Outcome` each, in order. In between the machine is as in the snapshot, and may be
        run or changed: the next batch begins at the snapshot all the same.

    Raises:
        ValueError: an input is too long, or the machine has several vCPUs.
        TypeError: an input is something else than bytes.
        Exception: what a handler raised; a note says at which input. As with Ctrl-C, outcomes of
            the inputs before it are yielded first.

    A HLT ends a run unless it has a hook; with ``irqchip`` it waits in the kernel: give ``until``.
    ``m.stop()`` without a reason of its own ends the whole loop.
    """
    if len(machine.cpus) != 1:
        raise ValueError(f"fuzzing takes a machine with one vCPU, not {len(machine.cpus)}")
    if batch < 1:
        raise ValueError(f"a batch has at least one input, not {batch}")
    if (timeout is not None and not timeout > 0) or (max_exits is not None and max_exits < 0):
        raise ValueError(f"timeout={timeout!r}, max_exits={max_exits}: neither is negative")
    return _Fuzzer(
        machine, snapshot, write_at, length_at, size, until, timeout, max_exits, coverage, known,
        exact,
    ).run(iter(inputs), batch)  # fmt: skip


class _Fuzzer:
    def __init__(
        self,
        machine: Machine,
        snapshot: Snapshot,
        write_at: int,
        length_at: int | None,
        size: int,
        until: int | None,
        timeout: float | None,
        max_exits: int | None,
        coverage: tuple[int, int] | Coverage | None,
        known: bytearray | None,
        exact: bool,
    ) -> None:
        self._machine = machine
        self._snapshot = snapshot
        self._until = until
        self._size = size
        snapshot.restore(machine)
        self._plan = plan = plan_of(machine, snapshot)
        self._runner = runner = machine._runners[0]
        self._over = False
        self.c = c = ffi.new("struct pykvm_fuzz *")
        c.reset, c.vcpu, c.room = plan.c, runner.c, size
        c.to, c.slot, c.at = self._place(write_at, size)
        if length_at is not None:
            c.length_to, c.length_slot, c.length_at = self._place(length_at, 8)
        self._blocks = None if isinstance(coverage, tuple) else coverage
        # What Python knows of inputs, by their number in their batch: fresh blocks, and how they
        # ended; and C's outcome of the last of these.
        self._found: dict[int, int] = {}
        self._reasons: dict[int, tuple[str, int | None]] = {}
        self._ended = 0
        self._ordered: Any = None
        self._renewed = -1
        if isinstance(coverage, tuple):
            gpa, length = coverage
            c.map, _, _ = self._place(gpa, length)
            known = bytearray(length) if known is None else known
            if len(known) != length:
                raise ValueError(f"known has {len(known)} bytes, the coverage map {length}")
            self._known = ffi.from_buffer("uint8_t[]", known, require_writable=True)
            c.known, c.map_size = self._known, length
        c.timeout = 0 if timeout is None or timeout >= 1e9 else max(1, int(timeout * 1e9))
        c.exit_limit = UNLIMITED if max_exits is None else max_exits
        c.calls = plan.timeless if exact or plan.nested else 0

    def _place(self, gpa: int, size: int) -> tuple[Any, Any, int]:
        """Host address, slot and offset of a stretch of memory."""
        parts = self._snapshot.image.parts
        regions = self._machine.memory.regions
        for number, (part, region) in enumerate(zip(parts, regions, strict=True)):
            if part.gpa <= gpa and 0 < size <= part.gpa + part.size - gpa:
                host = ffi.cast("uint8_t *", region.userspace_addr + gpa - part.gpa)
                return host, ffi.addressof(self._plan.c.slots[number]), gpa - part.gpa
        raise GuestMemoryError(f"{gpa:#x}..{gpa + size:#x} does not lie in one region", gpa, size)

    def _begin_anew(self) -> None:
        """Who looks at outcomes may run the machine; which pages that dirtied does not count."""
        c = plan_of(self._machine, self._snapshot).c
        kept = c.resets, c.differing, c.waste
        c.waste, c.patience = 0, 1 << 30
        # That stops lie over the snapshot's own bytes need not be looked at again.
        planted = self._stops()
        known = planted is not None and planted.renewed == self._renewed
        if known:
            self._ordered.give(c)
        try:
            # as after every other input
            self._snapshot.put_back(self._machine, resume=False, planted=known)
        finally:
            c.patience, c.plant_count = PATIENCE, 0
            c.resets, c.differing, c.waste = kept
        if planted is not None:
            self._renewed = planted.renewed

    def _stops(self) -> Planted | None:
        """Stops planted in memory. They are no part of the snapshot: C plants them with resets."""
        debugger = self._machine._debugger
        if debugger is None:
            return None
        if self._ordered is None:
            self._ordered = Ordered(debugger.planted)
        return debugger.planted

    # ---- batches -------------------------------------------------------------------------------

    def run(self, inputs: Iterator[bytes], batch: int) -> Iterator[Outcome]:
        """See :func:`fuzz`."""
        while not self._over:
            self.c.next = 0
            taken = [bytes(memoryview(data)) for data in islice(inputs, batch)]
            if not taken:
                return
            error = None
            try:
                self._run(taken)
                outcomes = self._outcomes(taken)
            except BaseException as caught:  # Ctrl-C, say: what was found by then is not lost
                self._over, error = True, caught
                outcomes = self._outcomes(taken)
            try:
                yield from outcomes
            except GeneratorExit:
                if isinstance(error, KeyboardInterrupt):
                    # Nobody asks for more, so that it cannot be raised here; and if this generator
                    # is just being taken away, neither can it in this moment.
                    start_new_thread(interrupt_main, ())
                raise
            if error is not None:
                try:
                    raise error
                finally:
                    del error

    def _run(self, inputs: list[bytes]) -> None:
        """One batch, with the vCPU ours for its time only."""
        machine, runner, c = self._machine, self._runner, self.c
        for data in inputs:
            if len(data) > self._size:
                raise ValueError(f"an input of {len(data)} bytes does not fit size={self._size}")
        self._begin_anew()
        runner.c.access.pending = lib.PYKVM_IDLE  # what the snapshot left untold is of no input
        joined = b"".join(inputs)
        ends, end = [], 0
        for data in inputs:
            end += len(data)
            ends.append(end)
        keep = (
            ffi.from_buffer("uint8_t[]", joined),
            ffi.new("uint64_t[]", ends),
            ffi.new("struct pykvm_outcome_record[]", len(inputs)),
        )
        c.inputs, c.ends, c.outcomes = keep
        self._records = keep[2]
        c.count, c.next, c.running = len(inputs), 0, 0
        self._devices = devices_of.find((machine.pio, machine.mmio))
        stateful = [
            each.c
            for bus in (machine.pio, machine.mmio)
            for each in bus.claims()
            if each.device is not None and each.on_write != lib.PYKVM_CLOCK
        ]
        ranges = ffi.new("struct pykvm_range *[]", stateful)
        c.stateful, c.stateful_count = ranges, len(stateful)
        c.hooked = lib.KVM_EXIT_HLT in machine._hooks
        planted = self._stops()
        if planted is not None:
            self._ordered.give(self._plan.c)
        if lib.KVM_EXIT_SHUTDOWN in machine._hooks or planted:
            c.hooked |= 2  # without an IDT, a planted stop in ring 3 is one
        if machine._virtio is not None and any(each.started for each in machine._virtio.threads):
            c.hooked |= 4  # they may be at work: wait for them, and put devices back, each time
        self._found.clear()
        self._reasons.clear()
        self._plan.before()
        loop = runner.c
        # Last of all, for a Ctrl-C that comes before the try would leave the port claimed.
        claim = None if self._until is None else machine.pio.stop(self._until, tag=UNTIL)
        machine._running = failed = True
        try:
            deadline = (
                time.clock_gettime_ns(time.CLOCK_MONOTONIC) + c.timeout if c.timeout else NEVER
            )
            try:
                runner._begin(lib.pykvm_vcpu_begin(loop, deadline))
                loop.trace = 0
                self._drive()
                failed = False
            finally:
                if runner.owner:
                    runner.owner = 0
                    loop.stop = 0
                lib.pykvm_vcpu_end(loop)
                loop.run.kvm_valid_regs = 0
        except BaseException as error:
            if c.running and c.next in self._reasons:  # it had ended, and was just not noted yet
                lib.pykvm_fuzz_end(c, self._ended)
            if c.running:
                error.add_note(f"while it ran the input {shown(inputs[c.next])}")
            raise
        finally:
            machine._running = False
            machine._ending = None
            if claim is not None:
                claim.release()
            self._plan.c.plant_count = 0
            for cpu, (entered, ended) in zip(machine.cpus, self._snapshot.cpus, strict=True):
                cpu.put_back(entered, ended)
            if failed:
                c.running = 0
                self._snapshot.restore(machine)

    def _drive(self) -> None:
        c, error, ones = self.c, ffi.new("int32_t *"), UNLIMITED
        while True:
            outcome = lib.pykvm_fuzz_run(c, ones, error)
            if outcome == lib.PYKVM_FUZZ_DONE:
                return
            if outcome == lib.PYKVM_FUZZ_DEVICES:
                devices_of.restore(self._devices, self._snapshot.devices)
            elif outcome == lib.PYKVM_FUZZ_FAILED:
                self._again(error[0])
            else:
                self._serve(outcome)
                if self._over:
                    return

    def _serve(self, outcome: int) -> None:
        """From here on Python runs this input to its end, as it may have changed devices."""
        machine, runner, c = self._machine, self._runner, self.c
        reached = len(self._blocks.hit) if self._blocks is not None else 0
        if outcome == lib.PYKVM_ACCESS:
            runner.c.access.pending = lib.PYKVM_RETRY  # have it handed out again, to its handler
            outcome = _cpython.run(runner.address, machine._slots, None)
        while (end := runner._other(outcome, None)) is None:
            outcome = _cpython.run(runner.address, machine._slots, None)
        if end.reason == reasons.STOPPED and machine._ending is not None:
            end, machine._ending = machine._ending, None
            if end.reason == reasons.STOPPED:
                self._over = True
        if self._blocks is not None and len(self._blocks.hit) > reached:
            self._found[c.next] = len(self._blocks.hit) - reached
        self._ended = outcome
        self._reasons[c.next] = end.reason, end.code
        if self._stops() is not None:
            self._ordered.give(self._plan.c)  # one was hit, and is gone
        with quiet(machine):
            failed = lib.pykvm_fuzz_end(c, outcome)
            if failed:
                self._again(failed)
            devices_of.restore(self._devices, self._snapshot.devices)

    def _again(self, error: int) -> None:
        """A reset failed: with an access still open, have it completed with care."""
        import errno

        if error == -errno.EAGAIN:
            self._runner.complete()
            error = lib.pykvm_reset(self._plan.c)
        elif self._plan.mend():
            error = lib.pykvm_reset(self._plan.c)
        if error:
            self._plan.fail(error)

    def _outcomes(self, inputs: list[bytes]) -> list[Outcome]:
        """What C noted of each input; one loop, without a call for each but Outcome's own."""
        done = self.c.next
        if not done:
            return []
        records = _RECORD.iter_unpack(ffi.buffer(self._records, done * _RECORD.size))
        found, reasons_of, made = self._found, self._reasons, []
        for at, (outcome, rip, exits, value, place, exit_reason, fresh) in enumerate(records):
            code: int | None = None
            if at in reasons_of:
                reason, code = reasons_of[at]
            elif outcome == _EXIT:
                reason = _EXITS[exit_reason]
            elif outcome == _STOPPED:
                code = value
                reason = UNTIL if place == self._until else self._tag(place)
            else:
                reason = _OUTCOMES[outcome]
            if at in found:
                fresh += found[at]
            address = place if outcome in _PLACED else None
            made.append(Outcome(inputs[at], reason, code, rip, exits, fresh, address))
        return made

    def _tag(self, address: int) -> str:
        for bus in (self._machine.pio, self._machine.mmio):
            claim = bus.find(address)
            if claim is not None and claim.tag:
                return claim.tag
        return reasons.STOPPED


_RECORD = Struct("<qQQQQII")
"""``struct pykvm_outcome_record``."""
_EXIT: int = lib.PYKVM_EXIT
_STOPPED: int = lib.PYKVM_STOPPED
_PLACED = (lib.PYKVM_STOPPED, lib.PYKVM_UNCLAIMED)
_EXITS = {lib.KVM_EXIT_HLT: reasons.HALTED, lib.KVM_EXIT_SHUTDOWN: reasons.SHUTDOWN}
_OUTCOMES = {
    lib.PYKVM_UNCLAIMED: reasons.UNCLAIMED,
    lib.PYKVM_LIMIT: reasons.LIMIT,
    lib.PYKVM_TIMEOUT: reasons.TIMEOUT,
}
