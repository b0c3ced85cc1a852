"""How a driver is interrupted: by a transport, by C where it serves the device, or not at all."""

from __future__ import annotations

from pykvm._abi import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from pykvm.devices.in_c import Latch

    class Interrupt(Protocol):
        """How a transport interrupts the driver; all from any thread."""

        def queue(self, index: int) -> None:
            """A queue has used buffers."""

        def config(self) -> None:
            """The configuration or the status changed."""

        def reset(self) -> None:
            """The device was reset: nothing is pending any more."""

        def direct(self, index: int) -> DirectInterrupt | None:
            """How C raises that of a queue by itself, or None: it cannot."""


PYTHON = int(lib.PYKVM_INTERRUPT_PYTHON)
"""In the place of an eventfd: it is raised in Python."""
NONE = int(lib.PYKVM_INTERRUPT_NONE)
"""The driver polls."""


class DirectInterrupt:
    """What C raises by itself (``csrc/blk.c``): the interrupt of a queue, from any thread.

    A transport sets it up.

    Args:
        fd: an eventfd, or one of the above.
        latch: gets ``bits`` before.

    Attributes:
        c: the ``struct pykvm_interrupt``.
    """

    __slots__ = ("_latch", "c")

    def __init__(self, fd: int = PYTHON, latch: Latch | None = None, bits: int = 0) -> None:
        self._latch = latch
        self.c = ffi.new("struct pykvm_interrupt *", {"fd": fd, "bits": bits})
        if latch is not None:
            self.c.latch = latch.c

    def set(self, fd: int) -> None:
        """Raise it so from now on."""
        lib.pykvm_interrupt_set(self.c, fd)


class NoInterrupt:
    """Stands in where nobody is to be interrupted."""

    def queue(self, index: int) -> None:
        """Nothing."""

    def config(self) -> None:
        """Nothing."""

    def reset(self) -> None:
        """Nothing."""

    def direct(self, index: int) -> DirectInterrupt | None:
        """None."""
        return None
