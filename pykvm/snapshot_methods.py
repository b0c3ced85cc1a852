"""What a machine can do with snapshots; the work is in :mod:`pykvm.snapshots` and its like."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator
    from typing import Any

    from pykvm.debug.input_log import InputLog
    from pykvm.outcome import Outcome
    from pykvm.replay import Recorder, Replay
    from pykvm.result import RunResult
    from pykvm.snapshot.reset import Plan, Tracking
    from pykvm.snapshots import Snapshot


class SnapshotMethods:
    """Part of :class:`~pykvm.Machine`."""

    options: dict[str, Any]
    _tracking: Tracking | None = None
    _plan: tuple[Snapshot, Plan] | None = None

    def snapshot(self) -> Snapshot:
        """All of the machine as it is now: memory, vCPUs, interrupt controllers, clocks, devices.

        An access that the guest has not finished (it was stopped in a handler, say) is finished
        first, with all ones for a read that nobody answered. Of what nobody has seen yet, another
        vCPU's write to a debug-exit port, say, the next run is still told.

        Raises:
            BusyError: it runs.
            SnapshotError: a device has requests that it cannot finish.
        """
        from pykvm.snapshot_taking import take

        return take(self)  # type: ignore[arg-type]

    def fuzz(
        self, snapshot: Snapshot, inputs: Iterable[bytes], **options: Any
    ) -> Iterator[Outcome]:
        """Run input after input, each from the snapshot on; see :func:`pykvm.fuzzing.fuzz`.

        ::

            for outcome in m.fuzz(s, inputs, write_at=0x2000, length_at=0x1FF8):
                if outcome.reason != "halted":
                    print(outcome)
        """
        from pykvm.fuzzing import fuzz

        return fuzz(self, snapshot, inputs, **options)  # type: ignore[arg-type]

    def record(self, *, limit: int = 1 << 28) -> Recorder:
        """Write down what the guest is given from outside while a ``with`` block lasts.

        ::

            with m.record() as log:
                m.run(timeout=1)
            log.save("run.log")

        Of every exit what the guest said and what it was answered, whoever answered it; and between
        exits what the host wrote to memory by ``m.mem``, and did to the vCPU. Not what goes through
        views of memory, nor what the guest reads without an exit: the TSC, RDRAND.

        Args:
            limit: bytes that it may take.

        Returns:
            What to use in ``with``, which gives the :class:`~pykvm.InputLog`.

        Raises:
            ReplayError: this machine cannot be recorded: why. On the way: the host did what is in
                no log, or ``limit`` is reached.
        """
        from pykvm.replay import Recorder

        return Recorder(self, limit)  # type: ignore[arg-type]

    def replay(self, log: InputLog, timeout: float | None = None) -> RunResult:
        """Run the guest with the answers of a log, from where the log begins.

        No handler is called and no device is asked. Every exit must be the log's: the same port or
        address, size and direction, and the same data written.

        Returns:
            A result with reason "replayed", the number of exits as its code; or "diverged", and
            ``result.exit`` and ``result.check()`` say at which exit, what the log has, what the
            guest did.

        Raises:
            ReplayError: the machine is another, or does not stand where the log begins.
        """
        with self.replaying(log) as replay:
            return replay.run(timeout)

    def replaying(self, log: InputLog) -> Replay:
        """As :meth:`replay`, for more than one run: all in a ``with`` block are of the log.

        A breakpoint then ends a run in the midst of the replay, and ``m.run()`` goes on with it.
        """
        from pykvm.replay import Replay

        return Replay(self, log)  # type: ignore[arg-type]

    def dump(self, path: str | os.PathLike[str]) -> None:
        """Write memory and registers as an ELF core file, for gdb and drgn.

        See :mod:`pykvm.snapshot.vmcore`. :func:`pykvm.vmcore.machine` is the way back.
        """
        with self.snapshot() as snapshot:
            snapshot.dump(path)
