"""Interrupts that C raises by itself, where a device is served in C (``csrc/blk.c``)."""

from __future__ import annotations

from pykvm._abi import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.devices.in_c import Latch

PYTHON = int(lib.PYKVM_INTERRUPT_PYTHON)
"""In the place of an eventfd: it is raised in Python."""
NONE = int(lib.PYKVM_INTERRUPT_NONE)
"""The driver polls."""


class DirectInterrupt:
    """The interrupt of a queue, as a transport has set it up; from any thread.

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
