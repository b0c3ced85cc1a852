"""A gdb stub: ``target remote`` to a machine.

One gdb at a time. A thread reads, so that Ctrl-C is seen while the guest runs; the guest runs in
the thread that called :meth:`GdbServer.serve`, so that a script's Ctrl-C reaches it too.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading

from pykvm.debug.gdb_address import listen
from pykvm.debug.gdb_packets import BROKEN, INTERRUPT, Reader, packet
from pykvm.debug.gdb_session import Session
from pykvm.kvm.handle import Closing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.debugging import Debugging
    from pykvm.result import RunResult

MOST_WAITING = 64
"""Packets that may wait: gdb sends one and waits for its answer."""


class GdbServer(Closing):
    """Waits for a gdb and serves it. Made by ``Machine.gdb_server()``.

    Attributes:
        address: where it listens, as ``target remote`` takes it.
    """

    def __init__(self, machine: Debugging, address: str = "", anywhere: bool = False) -> None:
        self._m = machine
        self._listener, self.address = listen(address, anywhere)
        self._lock = threading.Lock()
        self._running = False
        self._interrupted = False
        self._connection: socket.socket | None = None

    def serve(self, timeout: float | None = None) -> tuple[str, RunResult | None]:
        """Wait for a gdb, and do what it says until it leaves or the guest ends.

        Args:
            timeout: seconds to wait for it to connect.

        Returns:
            How it ended, and the last run's result or None. ``"ended"``: the guest did.
            ``"detached"``: gdb went and left the guest to go on; its breakpoints are taken away.
            ``"killed"``: gdb wants it to end. ``"lost"``: the connection broke.

        Raises:
            TimeoutError: nobody came.
        """
        self._listener.settimeout(timeout)
        connection, _ = self._listener.accept()
        connection.settimeout(None)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        packets: queue.Queue[bytes | None] = queue.Queue(MOST_WAITING)
        session = Session(self._m, self._resume)
        reader = threading.Thread(
            target=self._read, args=(connection, packets, session), name="gdb", daemon=True
        )
        reader.start()
        try:
            while not session.over:
                payload = packets.get()
                if payload is None:
                    break
                try:
                    for answer in session.answer(payload):
                        connection.sendall(packet(answer))
                except OSError:
                    break
        finally:
            session.close()
            self._connection = None
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            while reader.is_alive():  # it may wait for room
                with contextlib.suppress(queue.Empty):
                    packets.get(timeout=0.05)
            connection.close()
        return session.over or "lost", session.result

    def _read(
        self, connection: socket.socket, packets: queue.Queue[bytes | None], session: Session
    ) -> None:
        parser = Reader()
        try:
            while data := connection.recv(4096):
                for item in parser.feed(data):
                    if item is INTERRUPT:
                        self._interrupt()
                    elif item is BROKEN:
                        connection.sendall(b"-")
                    elif isinstance(item, bytes):
                        if session.acks:
                            connection.sendall(b"+")
                        with self._lock:  # a Ctrl-C that came too late was not meant for this
                            self._interrupted = False
                        self._enqueue(packets, item)
        except OSError:
            pass
        self._interrupt()
        packets.put(None)

    def _enqueue(self, packets: queue.Queue[bytes | None], item: bytes) -> None:
        """Have a packet wait its turn.

        Raises:
            ConnectionError: too many wait while the guest runs. Whoever sends them is no gdb, and
                waiting for room nobody would see a Ctrl-C any more, or that it has gone.
        """
        while True:
            try:
                packets.put(item, timeout=0.05)
                return
            except queue.Full:
                if self._running:
                    raise ConnectionError("too many packets while the guest runs") from None

    def _interrupt(self) -> None:
        with self._lock:
            self._interrupted = True
            if self._running:
                self._m.stop()

    def _resume(self, run: Callable[[], RunResult]) -> RunResult:
        with self._lock:
            self._running = True
            if self._interrupted:
                self._m.stop()
        try:
            return run()
        finally:
            with self._lock:
                self._running = self._interrupted = False
                self._m.forget_stop()

    def close(self) -> None:
        """Listen no longer. Idempotent."""
        self._listener.close()
        if "/" in self.address:
            with contextlib.suppress(OSError):
                os.unlink(self.address)


def run_under_gdb(
    machine: Debugging,
    address: str,
    say: Callable[[str], object],
    *,
    anywhere: bool = False,
    timeout: float | None = None,
    max_exits: int | None = None,
) -> RunResult:
    """Wait for a gdb, let it run the machine, and go on without it where it detaches.

    Args:
        machine: ready to run.
        address, anywhere: as of ``Machine.gdb_server``.
        say: told how to connect, a line without its end.
        timeout, max_exits: of the run after gdb has detached.

    Returns:
        How the guest ended: with reason "interrupted" if gdb killed it, or the connection broke.
    """
    with GdbServer(machine, address, anywhere) as server:
        say(f'gdb: waiting for "target remote {server.address}"')
        how, result = server.serve()
    if how == "ended" and result is not None:
        return result
    if how == "detached":
        return machine.run(timeout, max_exits=max_exits)
    machine.stop("interrupted")
    return machine.run()
