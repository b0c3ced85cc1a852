"""Signals that end a run: it ends the ordinary way, and says where the guest was."""

from __future__ import annotations

from pykvm import result as reasons

from . import exitcodes

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from types import FrameType
    from typing import Any

    from pykvm.machine import Machine
else:
    import _signal as signal  # the same functions; signal adds enum, dear at a command's start

ENDING = (signal.SIGTERM, signal.SIGHUP)


class EndingSignals:
    """For the length of a ``with``: SIGTERM and SIGHUP stop the machine, Ctrl-C as ever.

    A second one does not wait for the first: it leaves through every ``finally``.

    Args:
        machine: what to stop.
        give_up: called first, from the signal's handler: let nothing block any longer.
    """

    def __init__(self, machine: Machine, give_up: Callable[[], object]) -> None:
        self._machine = machine
        self._give_up = give_up
        self._before: dict[int, Any] = {}
        self._came = 0

    def __enter__(self) -> EndingSignals:
        for number in ENDING:
            self._before[number] = signal.signal(number, self._end)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored (nohup, &)
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._give_up()
        self._came += 1
        if self._came > 1 or not self._machine.running:
            raise SystemExit(exitcodes.SIGNALLED + number)
        self._machine.stop(reasons.TERMINATED, number)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._give_up()
        raise KeyboardInterrupt
