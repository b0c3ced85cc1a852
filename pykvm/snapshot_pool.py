"""Forks of one snapshot in several processes, to use more than one core.

::

    def try_it(machine, data):
        machine.mem.write(0x20000, data)
        return machine.run(timeout=1).reason

    if __name__ == "__main__":
        with SnapshotPool(s, workers=2) as pool:
            for reason in pool.map(try_it, inputs):
                ...

A process has one machine, restored before each call. Processes are spawned, never forked:
a VM belongs to the process that made it, and threads do not survive a fork. What is called has to
be importable: a function of a module. Ctrl-C is for the process that has the pool: as it leaves the
``with`` block, the others end, wherever they are; they do not see it themselves.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import Pipe, get_context, parent_process
from multiprocessing.connection import wait

from pykvm.errors import SnapshotError
from pykvm.kvm.handle import Closing
from pykvm.snapshot.file import read_header
from pykvm.snapshots import Snapshot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future
    from multiprocessing.connection import Connection
    from typing import Any

    from pykvm.machine import Machine


class SnapshotPool(Closing):
    """Processes with a fork of a snapshot each; an executor as in ``concurrent.futures``.

    Args:
        snapshot: what to fork. It is saved to a file, in memory where there is /dev/shm, unless it
            is in one already.
        workers: how many processes; as many as cores by default.
        setup: called with each new machine, as for ``Snapshot.fork``; a function of a module.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        workers: int | None = None,
        setup: Callable[[Machine], object] | None = None,
    ) -> None:
        path = snapshot.path if _is_in(snapshot.path, snapshot.id) else ""
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if not path:
            place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
            self._folder = tempfile.TemporaryDirectory(prefix="pykvm-", dir=place)
            path, known = os.path.join(self._folder.name, "snapshot"), snapshot.path
            snapshot.save(path)
            snapshot.path = known  # this one goes with the pool
        folder = self._folder.name if self._folder else ""
        # Nothing is ever sent: processes end when our end of it is closed.
        self._theirs, self._leash = Pipe(duplex=False)
        self._executor = ProcessPoolExecutor(
            workers or os.cpu_count() or 1,
            mp_context=get_context("spawn"),
            initializer=_begin,
            initargs=(path, snapshot.id, setup, folder, self._theirs),
        )

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have ``function(machine, *arguments)`` called in one of the processes."""
        return self._executor.submit(_call, function, arguments)

    def map(
        self, function: Callable[[Machine, Any], Any], items: Iterable[Any], *, chunk: int = 16
    ) -> Iterator[Any]:
        """Call ``function(machine, item)`` for each; what it returns, in order.

        Args:
            function: see :meth:`submit`.
            items: what can be pickled.
            chunk: items that a process gets at once.
        """
        return self._executor.map(_each, ((function, item) for item in items), chunksize=chunk)

    def close(self) -> None:
        """End the processes, once the calls that they are at are done. Idempotent."""
        try:
            self._executor.shutdown(cancel_futures=True)
        finally:  # Ctrl-C: those calls may take for ever
            self._leash.close()
            self._theirs.close()
            if self._folder is not None:
                self._folder.cleanup()
                self._folder = None

    def __exit__(self, *exc: object) -> None:
        if exc[1] is not None and not isinstance(exc[1], Exception):
            self._leash.close()  # Ctrl-C, sys.exit(): nobody waits for what they are at
        self.close()


def _is_in(path: str, id: str) -> bool:
    """Whether a file is the snapshot of that id."""
    try:
        return bool(path) and read_header(path).get("id") == id
    except (OSError, SnapshotError):
        return False


# ---- in the processes --------------------------------------------------------------------------

_mine: list[tuple[Snapshot, Machine]] = []


def _begin(
    path: str,
    id: str,
    setup: Callable[[Machine], object] | None,
    folder: str = "",
    leash: Connection | None = None,
) -> None:
    import atexit
    import threading

    if leash is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_end_with_the_pool, args=(folder, leash), daemon=True).start()
    snapshot = Snapshot.load(path, verify=False)
    if snapshot.id != id:  # a process may be started when the pool is long at work
        raise SnapshotError(f"{path}: has become another snapshot since the pool was made")
    machine = snapshot.fork(setup, identity="keep")  # as restore() has it before each call
    atexit.register(machine.close)
    _mine.append((snapshot, machine))


def _end_with_the_pool(folder: str, leash: Connection) -> None:
    """A pool that is left, or killed, does not leave its workers and its file behind."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel, leash])
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    snapshot, machine = _mine[0]
    snapshot.restore(machine)
    return function(machine, *arguments)


def _each(work: tuple[Callable[[Machine, Any], Any], Any]) -> Any:
    return _call(work[0], (work[1],))
