"""Spare machines, made ahead of time: what KVM takes a millisecond to make is there at once."""

from __future__ import annotations

import threading
import time

from pykvm.errors import ClosedError
from pykvm.kvm.handle import Closing
from pykvm.machine import Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


HEAD_START = 0.002
"""Seconds that a taker has for its guest's first steps before the pool starts to make the next
machine, which would compete for the GIL and the kernel's locks; nobody waits if the stock is empty.
"""


class Pool(Closing):
    """A stock of fresh machines, all alike.

    ::

        with pykvm.Pool(4, memory="2M") as pool:
            for image in images:
                with pool.take() as m:
                    ...

    A machine that was taken is the caller's, to use once and close; the pool makes another in a
    thread of its own meanwhile. Nothing is ever put back, so nothing leaks from one guest into the
    next.

    Args:
        size: spare machines to keep.
        options: as for :class:`pykvm.Machine`; memory must be a size.

    Raises:
        CapabilityError: no usable KVM, with the remedy.
    """

    def __init__(self, size: int, **options: Any) -> None:
        if size < 1:
            raise ValueError(f"a pool keeps at least 1 machine, not {size}")
        if not isinstance(options.get("memory", "2M"), (int, str)):
            raise TypeError("a pool makes its own memory: give a size")
        self._size = size
        self._options = options
        self._spare: list[Machine] = []
        self._error: BaseException | None = None
        self._closed = False
        self._taken = 0.0  # time of the last take
        self._change = threading.Condition()
        try:
            for _ in range(size):
                self._spare.append(self._make())
        except BaseException:
            self.close()
            raise
        self._filler = threading.Thread(target=self._fill, name="pykvm-pool", daemon=True)
        self._filler.start()

    def take(self) -> Machine:
        """A fresh machine; waits for one to be made only if the stock is empty.

        Raises:
            ClosedError: the pool is closed.
            Exception: what went wrong when the pool tried to make one.
        """
        with self._change:
            while not self._spare:
                if self._closed:
                    raise ClosedError("this pool is closed")
                if self._error is not None:
                    error, self._error = self._error, None
                    self._change.notify_all()  # the next taker makes it try again
                    raise error
                self._change.wait()
            machine = self._spare.pop()
            self._taken = time.monotonic()
            self._change.notify_all()
            return machine

    def __len__(self) -> int:
        return len(self._spare)

    def _make(self) -> Machine:
        """A machine whose registers are at hand, so that entering it costs the taker no ioctl."""
        machine = Machine(**self._options)
        try:
            for cpu in machine.cpus:
                cpu.load_sregs()
                cpu.load_regs()
        except BaseException:
            machine.close()
            raise
        return machine

    def _urgent(self) -> bool:
        return self._closed or not self._spare

    def _fill(self) -> None:
        while True:
            with self._change:
                while not self._closed and (self._error or len(self._spare) >= self._size):
                    self._change.wait()
                self._change.wait_for(self._urgent, self._taken + HEAD_START - time.monotonic())
                if self._closed:
                    return
            machine, error = None, None
            try:
                machine = self._make()
            except BaseException as caught:
                error = caught
            with self._change:
                self._error = error
                if machine is not None and not self._closed:
                    self._spare.append(machine)
                    machine = None
                self._change.notify_all()
            if machine is not None:
                machine.close()

    def close(self) -> None:
        """Close the spare machines; those taken stay their takers'. Idempotent."""
        with self._change:
            self._closed = True
            spare, self._spare = self._spare, []
            self._change.notify_all()
        filler = getattr(self, "_filler", None)
        if filler is not None:
            filler.join()
        for machine in spare:
            machine.close()
