"""The console device (virtio 1.2, 5.3), with its one port: a guest's terminal from Python."""

from __future__ import annotations

from struct import Struct

from pykvm.devices.transcript import TRANSCRIPT_BYTES, Transcript
from pykvm.devices.virtio.device import VirtioDevice
from pykvm.errors import GuestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.devices.virtio.queue import Chain, Queue

F_SIZE, F_EMERG_WRITE = 0, 2
"""Features (5.3.3)."""

RECEIVE, TRANSMIT = 0, 1
"""Queues of port 0 (5.3.2)."""

EMERG_WRITE = 8
"""Offset in the configuration: a character without any queue (5.3.4)."""

_CONFIG = Struct("<HHII")  # columns, rows, ports, emergency write
_CHUNK = 4096
"""Bytes of input that one buffer takes, however large it is."""
MAX_OUTPUT = 1 << 20
"""The most bytes that are printed by one request: "a reasonable limit" (2.7.4.1)."""


class VirtioConsole(VirtioDevice):
    """A virtio console: what the guest prints is read, or waited for; what is written it receives.

    Args:
        output: called with bytes as they come, in the thread that serves the device.
        keep: how many bytes of output are kept to be looked at.
        columns, rows: size of the terminal.

    Input waits, in any amount, until the driver has buffers for it.
    """

    NAME = "console"
    device_id = 3
    queue_max_sizes = (64, 64)
    device_features = 1 << F_SIZE | 1 << F_EMERG_WRITE

    def __init__(
        self,
        *,
        output: Callable[[bytes], object] | None = None,
        keep: int = TRANSCRIPT_BYTES,
        columns: int = 80,
        rows: int = 25,
    ) -> None:
        super().__init__()
        self._output = output
        self._transcript = Transcript(keep)
        self._typed = bytearray()
        self._size = (columns, rows)

    # ---- for people ----------------------------------------------------------------------------

    @property
    def transcript(self) -> bytes:
        """The last bytes that the guest printed."""
        return self._transcript.kept

    def lines(self, count: int = 10) -> list[str]:
        """The last lines of the transcript, decoded for reading."""
        return self._transcript.lines(count)

    def read(self) -> bytes:
        """What the guest printed since this was called last, as far as it is kept."""
        return self._transcript.read()

    def expect(self, pattern: Any, timeout: float | None = None) -> bytes:
        """Wait until the guest prints ``pattern``: bytes, or a compiled ``re`` pattern over bytes.

        Returns:
            Everything from the last match up to and including this one.

        Raises:
            ExpectError: the time is over, or the run ended first; with what was there instead.
        """
        return self._transcript.expect(pattern, timeout)

    def write(self, data: bytes) -> None:
        """Type: bytes the guest will receive; any amount, from any thread."""
        with self.lock:
            self._typed += data
            synchronous = self.synchronous
        if synchronous or self.io is None:
            self.notify(RECEIVE)
        else:
            self.io.call(lambda: self.notify(RECEIVE))

    @property
    def pending(self) -> int:
        """Bytes of input that the guest has not received yet."""
        return len(self._typed)

    def resize(self, columns: int, rows: int) -> None:
        """Tell the guest of another size of the terminal."""
        with self.lock:
            self._size = (columns, rows)
        self.config_changed()

    # ---- the device ----------------------------------------------------------------------------

    def activate(self) -> None:
        """What was typed early waits for the driver's first buffers."""

    def queue_notify(self, index: int) -> bool:
        """Take output; or give input, while there is any and buffers for it."""
        if index == TRANSMIT:
            return self.serve(index, self._print)
        return self._receive()

    def _print(self, queue: Queue, chain: Chain) -> int:
        if chain.read_bytes > MAX_OUTPUT:
            raise GuestError(f"{chain.read_bytes} bytes of output at once")
        for view in chain.readable:
            self._show(bytes(view[:]))
        return 0

    def _show(self, data: bytes) -> None:
        self._transcript.feed(data)
        if self._output is not None:
            self._output(data)

    def _receive(self) -> bool:
        queue = self.queues[RECEIVE]
        pushed = False
        try:
            for _ in range(queue.size):
                if not self._typed:
                    return False
                chain = queue.pop()
                if chain is None:
                    return False
                written = chain.write(bytes(self._typed[:_CHUNK]))
                del self._typed[:written]
                pushed |= queue.push(chain, written)
                self.counters.done(chain.began, written, chain.read_bytes, not written)
            return bool(self._typed) and queue.has_work()
        finally:
            if pushed and queue.should_interrupt():
                self._interrupt(queue)

    def config_read(self, offset: int, size: int) -> bytes:
        """The terminal's size; one port."""
        return _CONFIG.pack(*self._size, 1, 0)[offset : offset + size]

    def config_write(self, offset: int, data: bytes) -> None:
        """A character of a driver that has no queues (yet): printed like any other."""
        if offset == EMERG_WRITE:
            self._show(data[:1])

    # ---- life ----------------------------------------------------------------------------------

    def run_begins(self) -> None:
        """The guest runs: it is worth waiting for output."""
        self._transcript.end(False)

    def run_ended(self) -> None:
        """Nobody waits for output any longer."""
        self._transcript.end()

    def device_state(self) -> dict[str, Any]:
        """The terminal's size and what waits to be received."""
        return {"size": list(self._size), "typed": list(self._typed)}

    def restore_device(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`device_state` returned."""
        columns, rows = state["size"]
        self._size = (columns, rows)
        self._typed[:] = bytes(state["typed"])
