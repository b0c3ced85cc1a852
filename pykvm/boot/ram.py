"""What loaders need of guest memory."""

from __future__ import annotations

from pykvm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from collections.abc import Sequence
    from typing import Protocol

    Buffer = bytes | bytearray | memoryview | mmap.mmap

    class Region(Protocol):
        """A stretch of RAM or ROM."""

        @property
        def guest_phys_addr(self) -> int:
            """Its first gpa."""

        @property
        def memory_size(self) -> int:
            """Its bytes."""

        @property
        def readonly(self) -> bool:
            """Whether it is a ROM."""

    class Memory(Protocol):
        """Guest memory as ``elf.load`` and ``flat.load`` see it."""

        def covers(self, gpa: int, length: int) -> bool:
            """Whether all of it is RAM or ROM."""

        def load(self, gpa: int, data: Buffer) -> None:
            """Copy bytes in, into read-only regions too."""

    class MappedMemory(Protocol):
        """Guest memory as ``boot.load`` sees it; ``pykvm.memory.GuestMemory`` is both."""

        @property
        def regions(self) -> Sequence[Region]:
            """All regions, sorted by gpa."""

        def load(self, gpa: int, data: Buffer) -> None:
            """Copy bytes in."""

        def fill(self, gpa: int, length: int) -> None:
            """Zero bytes, best without touching what is zero."""


_ZEROS = 1 << 20


def require_ram(mem: Memory, gpa: int, length: int, what: str) -> None:
    """Raise BootError unless ``length`` bytes at ``gpa`` are RAM or ROM."""
    if not mem.covers(gpa, length):
        raise BootError(
            f"{what}: expected RAM at {gpa:#x}..{gpa + length - 1:#x}, found a hole in {mem!r}"
        )


def zero(mem: Memory, gpa: int, length: int) -> None:
    """Zero ``length`` bytes, in pieces, so that a large .bss needs no buffer of its size."""
    for offset in range(0, length, _ZEROS):
        mem.load(gpa + offset, bytes(min(_ZEROS, length - offset)))
