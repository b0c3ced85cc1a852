"""What a machine can do with snapshots; the work is in :mod:`pykvm.snapshots` and its like."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator
    from typing import Any

    from pykvm.fuzzing import Outcome
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
        first, with all ones for a read that nobody answered.

        Raises:
            BusyError: it runs.
            SnapshotError: a device has requests that it cannot finish.
        """
        from pykvm.snapshots import take

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

    def dump(self, path: str | os.PathLike[str]) -> None:
        """Write memory and registers as an ELF core file, for gdb, crash and drgn.

        See :mod:`pykvm.snapshot.vmcore`. :func:`pykvm.vmcore.machine` is the way back.
        """
        with self.snapshot() as snapshot:
            snapshot.dump(path)
