"""The I/O thread: one for all devices of a machine; it sleeps until a doorbell rings.

It starts when it is first given something to do. What it calls is not to block for long: everything
else in the thread waits for it.
"""

from __future__ import annotations

import heapq
import os
import select
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress

from pykvm.errors import ClosedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Protocol

    class Server(Protocol):
        """Serves in C what rings while the thread waits."""

        def poll(self, epoll_fd: int, seconds: float) -> list[tuple[int, int]]:
            """Wait as ``epoll.poll`` does; what was served is left out."""

        def forget(self, fd: int) -> None:
            """Serve a doorbell no more."""

        def pause(self) -> None:
            """Serve nothing, and wait for what is being served."""

        def resume(self) -> None:
            """Go on."""


SETTLE_ROUNDS = 64
"""How often :meth:`IoThread.settle` looks for more, so that a guest cannot hold it up."""


class IoThread:
    """A thread that waits for file descriptors and times, and calls what belongs to them.

    All methods may be called from any thread.

    Args:
        name: of the thread.
        on_error: called, in the thread, with what a callback raised; without it, it is printed as
            of any thread. Either way the thread goes on.
    """

    def __init__(
        self, name: str = "pykvm-io", on_error: Callable[[BaseException], object] | None = None
    ) -> None:
        self._name = name
        self._on_error = on_error
        self._epoll: select.epoll | None = None
        self._wake = -1
        self._thread: threading.Thread | None = None
        self._watched: dict[int, Callable[[], object]] = {}
        self._calls: deque[Callable[[], object]] = deque()
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = iter(range(1 << 62))
        self._change = threading.Condition()
        self._pauses = 0
        self._working = False
        self._closed = False
        self._server: Server | None = None

    # ---- what to do ----------------------------------------------------------------------------

    def add(self, fd: int, callback: Callable[[], object]) -> None:
        """Call ``callback`` whenever the eventfd ``fd`` was written; its count is read first."""
        with self._change:
            self._start()
            assert self._epoll is not None
            self._watched[fd] = callback
            self._epoll.register(fd, select.EPOLLIN)

    def serve_with(self, server: Server) -> None:
        """Have a server wait in the thread's place. Before the first :meth:`add`, and one only."""
        self._server = server

    def remove(self, fd: int) -> None:
        """Watch ``fd`` no more. When this returns its callback does not run, nor will. Idempotent.

        In the thread itself, a callback under way is the caller's own.
        """
        with self._change:
            if self._watched.pop(fd, None) is None:
                return
            assert self._epoll is not None
            self._epoll.unregister(fd)
            self._wait_until_idle()
        if self._server is not None:
            self._server.forget(fd)

    def call(self, function: Callable[[], object]) -> None:
        """Have ``function`` called in the thread, soon."""
        with self._change:
            self._start()
            self._calls.append(function)
        os.eventfd_write(self._wake, 1)

    def later(self, seconds: float, function: Callable[[], object]) -> None:
        """Have ``function`` called in the thread after so many seconds."""
        with self._change:
            self._start()
            heapq.heappush(
                self._timers, (time.monotonic() + seconds, next(self._numbers), function)
            )
        os.eventfd_write(self._wake, 1)

    # ---- when --------------------------------------------------------------------------------

    @property
    def started(self) -> bool:
        """Whether there is a thread."""
        return self._thread is not None

    @contextmanager
    def quiesce(self) -> Iterator[None]:
        """Hold the thread still: within the ``with`` nothing of it runs. They nest."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("the I/O thread cannot wait for itself")
        with self._change:
            self._pauses += 1
            self._wait_until_idle()
        if self._server is not None:
            self._server.pause()
        try:
            yield
        finally:
            if self._server is not None:
                self._server.resume()
            with self._change:
                self._pauses -= 1
                self._change.notify_all()

    def settle(self, timeout: float = 10.0) -> bool:
        """Wait until what was to do when this was called is done; False after the time-out.

        Doorbells that rang before were served then, as far as a device serves them at once.
        """
        if self._thread is None:
            return True
        done = threading.Event()
        self.call(lambda: self._drain(done))
        return done.wait(timeout)

    def close(self) -> None:
        """End the thread and wait for it. Idempotent; what was still to do is not done."""
        with self._change:
            self._closed = True
            self._pauses = 0
            self._change.notify_all()
            thread = self._thread
        if thread is None:
            return
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)
        thread.join()
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1
        self._watched.clear()
        self._calls.clear()
        self._timers.clear()

    # ---- the thread ----------------------------------------------------------------------------

    def _start(self) -> None:
        """With the lock held."""
        if self._closed:
            raise ClosedError("this I/O thread was closed")
        if self._thread is None:
            self._epoll = select.epoll()
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._epoll.register(self._wake, select.EPOLLIN)
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def _wait_until_idle(self) -> None:
        """With the lock held; also of use in the thread itself, where it does nothing."""
        while self._working and threading.current_thread() is not self._thread:
            self._change.wait()

    def _run(self) -> None:
        assert self._epoll is not None
        while not self._closed:
            if self._server is None:
                events = self._epoll.poll(self._patience())
            else:
                events = self._server.poll(self._epoll.fileno(), self._patience())
            self._round(events)

    def _patience(self) -> float:
        with self._change:
            if self._calls:
                return 0
            if not self._timers:
                return -1
            return max(self._timers[0][0] - time.monotonic(), 0)

    def _round(self, events: list[tuple[int, int]]) -> int:
        """Do what is due; return how many callbacks that were, but for those of `settle`."""
        with self._change:
            while self._pauses and not self._closed:
                self._change.wait()
            if self._closed:
                return 0
            due = [self._watched[fd] for fd, _ in events if fd in self._watched]
            for fd, _ in events:
                if fd in self._watched or fd == self._wake:
                    _read(fd)
            while self._timers and self._timers[0][0] <= time.monotonic():
                due.append(heapq.heappop(self._timers)[2])
            due += self._calls
            self._calls.clear()
            self._working = True
        try:
            for callback in due:
                self._call(callback)
        finally:
            with self._change:
                self._working = False
                self._change.notify_all()
        return len(due)

    def _drain(self, done: threading.Event) -> None:
        """Within a round: what rings now is served as well, some rounds long."""
        assert self._epoll is not None
        for _ in range(SETTLE_ROUNDS):
            with self._change:
                calls, due = list(self._calls), []
                self._calls.clear()
                for fd, _ in self._epoll.poll(0):
                    if fd in self._watched:
                        due.append(self._watched[fd])
                    _read(fd)
            if not calls and not due:
                break
            for callback in due + calls:
                self._call(callback)
        done.set()

    def _call(self, callback: Callable[[], object]) -> None:
        try:
            callback()
        except BaseException as error:
            if self._on_error is not None:
                self._on_error(error)
            else:
                threading.excepthook(
                    threading.ExceptHookArgs(
                        (type(error), error, error.__traceback__, threading.current_thread())
                    )
                )


def _read(fd: int) -> None:
    """Take an eventfd's count; somebody else may have."""
    with suppress(BlockingIOError):
        os.eventfd_read(fd)
