"""A run in the background: ``Machine.start()`` returns it, a script waits for it or stops it."""

from __future__ import annotations

import threading

from pykvm import result as reasons
from pykvm.errors import BusyError
from pykvm.kvm.handle import Closing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.result import RunResult
    from pykvm.runs import Runs


class Background(Closing):
    """A run of a machine in a thread of its own.

    While it runs the script may use the console, guest memory, ``m.stop()``; the registers belong
    to the run until it has ended. Handlers are called in its threads.
    """

    def __init__(self, machine: Runs, result: RunResult | None = None) -> None:
        self._machine = machine
        self._result = result
        self._raised: BaseException | None = None
        self._over = threading.Event()
        self._lock = threading.RLock()  # a signal's handler may stop it as well
        self._begun = False
        self._stopping = False
        self._thread: threading.Thread | None = None
        if result is not None:
            self._over.set()

    def begin(self, run: Callable[[], RunResult]) -> None:
        """Start it; the machine calls this."""

        def body() -> None:
            with self._lock:
                if self._over.is_set():  # given up already
                    return
                self._begun = True
            try:
                self._result = run()
            except BaseException as error:
                self._raised = error
            finally:
                with self._lock:
                    if self._stopping:  # it may have come after the end: not for the next run
                        self._machine.forget_stop()
                    self._machine._background_ended()
                    self._over.set()

        # A daemon: a script that dies without closing its machine is not kept from ending.
        self._thread = threading.Thread(target=body, name="run", daemon=True)
        self._thread.start()

    def give_up(self) -> bool:
        """Take begin() back, which was interrupted. The machine calls this.

        Returns:
            Whether it had begun to run; it has ended and cleaned up then.
        """
        with self._lock:
            if not self._begun:
                self._over.set()
                self._thread = None  # there may be none, and if there is it will not run anything
                return False
        self.close()
        return True

    @property
    def result(self) -> RunResult | None:
        """How it ended, or None while it runs (and if a handler's exception ended it)."""
        return self._result

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return not self._over.is_set()

    def wait(self, timeout: float | None = None) -> RunResult:
        """Wait for its end.

        Args:
            timeout: seconds to wait, or None. It does not end the run: that is ``start(timeout)``.

        Raises:
            TimeoutError: it still runs.
            BusyError: a handler of this very run asks.
            Exception: whatever a handler raised, unchanged.
        """
        self._refuse_handlers()
        if not self._over.wait(timeout):
            raise TimeoutError(f"the run has not ended in {timeout} s")
        if self._thread is not None:
            self._thread.join()
        if self._raised is not None:
            raise self._raised
        assert self._result is not None
        return self._result

    def stop(self, reason: str = reasons.STOPPED, code: int | None = None) -> RunResult:
        """End it and wait for that; what it had ended with, if it was over already.

        Raises:
            BusyError, Exception: as :meth:`wait`. A handler uses ``m.stop()``.
        """
        self._refuse_handlers()
        self._stop(reason, code)
        return self.wait()

    def close(self) -> None:
        """Stop it, whatever becomes of it. Idempotent.

        Raises:
            BusyError: a handler of this very run asks; nothing else.
        """
        self._refuse_handlers()
        self._stop(reasons.STOPPED, None)
        self._over.wait()
        if self._thread is not None:
            self._thread.join()

    def _refuse_handlers(self) -> None:
        """Who waits in a handler for the end of its run waits for ever."""
        me = threading.get_ident()
        if self.running and any(runner.owner == me for runner in self._machine._runners):
            raise BusyError("a handler cannot wait for the end of its own run: m.stop() ends it")

    def _stop(self, reason: str, code: int | None) -> None:
        with self._lock:
            if self.running:
                self._stopping = True
                self._machine.stop(reason, code)

    def __repr__(self) -> str:
        if self.running:
            return "<Background running>"
        return f"<Background {self._raised!r}>" if self._raised else f"<Background {self._result}>"
