"""A serial port: a 16550A whose registers are served in C (``csrc/uart.c``).

Linux's 8250 driver finds it, prints through it and takes input from it by interrupt without any
Python; Python has the two ends: what the guest sent, and what it is to receive.
"""

from __future__ import annotations

import os
import time

from pykvm._abi import ffi, lib
from pykvm.devices import KEEP_BYTES
from pykvm.devices.ring import RingDevice, RingFullError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.devices.bus import Bus
    from pykvm.devices.claim import Claim

LENGTH = 8
"""Registers, one byte each."""

MOMENT = 0.005
"""Seconds between two looks for room."""

_BREAK = 0x10
"""The break bit of LSR (PC16550D, table II), which comes with a zero byte."""

_REGISTERS = (
    "ier", "fcr", "lcr", "mcr", "scratch", "divisor_low", "divisor_high", "errors", "deltas",
    "emptied", "line",
)  # fmt: skip


class Serial(RingDevice):
    """A 16550A UART, complete with FIFOs, loopback and interrupts.

    The line is infinitely fast: output has left when it is written, input arrives when the guest
    looks. A guest that clears its FIFOs loses no input by it.

    Args:
        irq: an eventfd that gets 1 whenever the interrupt line rises, for KVM_IRQFD (COM1: GSI 4);
            it stays the caller's. None: the guest has to poll.
        sink: is called with batches of output instead of keeping them for :meth:`read`.
        keep: how many unread bytes of output are kept before the run ends in a RingFullError.
        capacity: size of the ring for output in bytes, a power of two.
        input_capacity: how much input can wait, in bytes, a power of two.
        flow_control: input waits until the guest raises RTS, as drivers do when the port is opened.
            With Linux no byte is lost then, however early it was written: opening reads the data
            register twice to clear it.
        wait: with ``keep`` bytes unread the guest waits until somebody reads, instead of the run
            ending. A stop or a timeout ends the waiting.

    The MCR's OUT2 bit, which has to be set on a PC for interrupts to pass, is not looked at.

    All methods may be called from any thread; a ``sink`` is called by one thread at a time.
    """

    def __init__(
        self,
        *,
        irq: int | None = None,
        sink: Callable[[bytes], object] | None = None,
        keep: int = KEEP_BYTES,
        capacity: int = 4096,
        input_capacity: int = 65536,
        flow_control: bool = False,
        wait: bool = False,
    ) -> None:
        if input_capacity < 16 or input_capacity & (input_capacity - 1):
            raise ValueError(
                f"input_capacity must be a power of two of at least 16, not {input_capacity}"
            )
        if irq is not None:
            os.fstat(irq)
        super().__init__("uint8_t", capacity, sink, keep)
        self._claims: list[Claim] = []
        self._consumed = -1
        self._wait = wait
        self._input = ffi.new("uint16_t[]", input_capacity)
        self.c = ffi.new("struct pykvm_uart *")
        self.c.irq = -1 if irq is None else irq
        self.c.consumed = -1
        self.c.flow_control = flow_control
        self.c.out = self.output.c
        self.c.input = self._input
        self.c.capacity = input_capacity
        self.c.divisor_low = 12  # 9600 baud: undefined at power-on, but Linux reads and divides

    def attach(self, bus: Bus, first: int) -> Claim:
        """Put the eight registers on a bus, from port or address ``first`` on."""
        claim = bus.uart(first, self)
        self._claims.append(claim)
        return claim

    # ---- from the guest ------------------------------------------------------------------------

    def read(self) -> bytes:
        """Everything that the guest has written and that was not read yet."""
        return self._take()

    def drain(self, at_end: bool = False) -> None:
        """As for any output; or, with ``wait``, return without room for more after a moment."""
        with self._lock:
            full = self._wait and self.sink is None and len(self._kept) >= self._keep
            if not full:
                super().drain(at_end)
        if full and not at_end:
            time.sleep(MOMENT)  # the vCPU's thread tries again, and looks whether it is to end

    # ---- to the guest --------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Let the guest receive ``data``, all of it or nothing.

        Raises:
            RingFullError: it does not fit into :attr:`room`.
        """
        self._receive(data, 0)

    def send_break(self) -> None:
        """Send a break: the line held down for longer than a character. To Linux, SysRq."""
        self._receive(b"\0", _BREAK)

    def _receive(self, data: bytes, errors: int) -> None:
        if lib.pykvm_uart_input(self.c, ffi.from_buffer("uint8_t[]", data), len(data), errors):
            raise RingFullError(
                f"{len(data)} bytes of input do not fit: the guest has not read {self.pending}"
                f" of {self.c.capacity} yet"
            )

    @property
    def pending(self) -> int:
        """Bytes of input that the guest has not read yet."""
        return int(self.c.head - self.c.tail)

    @property
    def room(self) -> int:
        """Bytes of input that :meth:`write` can take."""
        return int(self.c.capacity) - self.pending

    def input_fileno(self) -> int:
        """An eventfd that becomes readable when the guest has read the last byte of input."""
        if self._consumed < 0:
            self._consumed = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self.c.consumed = self._consumed
        return self._consumed

    # ---- life ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The registers and what waits in either direction, of a stopped machine."""
        c = self.c
        fifo = [c.fifo[(c.fifo_first + i) % len(c.fifo)] for i in range(c.fifo_count)]
        waiting = [c.input[i % c.capacity] for i in range(c.tail, c.head)]
        with self._lock:
            if self.sink is None:
                self._kept += self._pop()
            else:
                self.drain()
            output = bytes(self._kept)
        registers = {name: int(getattr(c, name)) for name in _REGISTERS}
        return {**registers, "fifo": fifo, "input": waiting, "output": list(output)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned, of a port with as much room for input.

        No interrupt is raised by it: one that was pending is in the interrupt controller's state.
        """
        if len(state["input"]) > self.c.capacity:
            raise ValueError(f"{len(state['input'])} bytes of input do not fit {self.c.capacity}")
        c = self.c
        for name in _REGISTERS:
            setattr(c, name, state[name])
        c.rose = 0
        c.fifo_first, c.fifo_count = 0, len(state["fifo"])
        c.fifo[0 : c.fifo_count] = state["fifo"]
        c.tail, c.head = 0, len(state["input"])
        c.input[0 : c.head] = state["input"]
        with self._lock:
            self._pop()
            self._kept[:] = bytes(state["output"])

    def close(self) -> None:
        """Leave the bus and release the eventfds. Idempotent; output can still be read."""
        for claim in self._claims:
            claim.release()
        self._claims.clear()
        self.c.irq = self.c.consumed = -1
        super().close()
        if self._consumed >= 0:
            os.close(self._consumed)
            self._consumed = -1

    def __repr__(self) -> str:
        return f"<Serial 16550A, {len(self.output)} bytes out, {self.pending} waiting in>"
