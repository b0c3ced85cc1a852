"""Put guest images into guest memory: flat binaries and static ELF executables.

Nothing here knows KVM. Memory is anything that has the two methods of ``Memory``, which
``pykvm.memory.GuestMemory`` does.
"""

from __future__ import annotations

from pykvm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    Buffer = bytes | bytearray | memoryview

    class Memory(Protocol):
        """What a loader needs of guest memory."""

        def covers(self, gpa: int, length: int) -> bool:
            """Whether all of it is RAM."""

        def load(self, gpa: int, data: Buffer) -> None:
            """Copy bytes in, into read-only regions too."""


_ZEROS = 1 << 20


def require_ram(mem: Memory, gpa: int, length: int, what: str) -> None:
    """Raise BootError unless ``length`` bytes at ``gpa`` are RAM."""
    if not mem.covers(gpa, length):
        raise BootError(
            f"{what}: expected RAM at {gpa:#x}..{gpa + length - 1:#x}, found a hole in {mem!r}"
        )


def zero(mem: Memory, gpa: int, length: int) -> None:
    """Zero ``length`` bytes, in pieces, so that a large .bss needs no buffer of its size."""
    for offset in range(0, length, _ZEROS):
        mem.load(gpa + offset, bytes(min(_ZEROS, length - offset)))
