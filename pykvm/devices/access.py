"""What a handler is given: one access to a port or to guest-physical memory.

An access is a value: it may be kept after the handler returned. ``csrc/dispatch.c`` makes a fresh
one for every exit that a handler serves, in less time than Python takes to call a constructor.
"""

from __future__ import annotations

from pykvm._abi._cpython import MmioAccess, PioAccess

TYPE_CHECKING = False
if TYPE_CHECKING:
    Access = PioAccess | MmioAccess
    """An access of either kind, for devices that live on both buses."""

__all__ = ["MmioAccess", "PioAccess"]
