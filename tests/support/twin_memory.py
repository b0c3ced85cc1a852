"""Guest memory twice: as pykvm has it, and as plain byte strings for a model."""

from __future__ import annotations

from pykvm.memory import GuestMemory

RAM, ROM, ABOVE = 0x8000, 0x10000, 0x40_0000_0000
"""RAM from 0 to RAM, in regions that adjoin at half of it; a ROM; RAM at ABOVE."""
PAGE = 0x1000


class Mismatch(AssertionError):
    """The two disagree."""


class PlainMemory:
    """The model's memory: byte strings, and a list of what is where."""

    def __init__(self) -> None:
        self.regions = [
            (0, bytearray(RAM // 2), True),
            (RAM // 2, bytearray(RAM // 2), True),
            (ROM, bytearray(PAGE), False),
            (ABOVE, bytearray(PAGE), True),
        ]
        self.log: list[tuple[int, int]] | None = None
        self.armed = 0  # 1: `poke` after a read of the byte `trigger`; 2: after any write
        self.trigger = 0
        self.poke = (0, b"")

    def pieces(self, gpa: int, length: int) -> list[tuple[int, int]]:
        """Split at the borders of regions; AssertionError outside all."""
        found = []
        while length:
            base, data, _ = self._region(gpa)
            piece = min(length, base + len(data) - gpa)
            found.append((gpa, piece))
            gpa += piece
            length -= piece
        return found

    def _region(self, gpa: int) -> tuple[int, bytearray, bool]:
        for base, data, writable in self.regions:
            if base <= gpa < base + len(data):
                return base, data, writable
        raise AssertionError(f"{gpa:#x} is not in RAM")

    def covers(self, gpa: int, length: int, writable: bool) -> bool:
        """Whether a range is RAM, and may be written if asked."""
        try:
            pieces = self.pieces(gpa, length)
        except AssertionError:
            return False
        return not writable or all(self._region(at)[2] for at, _ in pieces)

    def read(self, gpa: int, length: int) -> bytes:
        """Read within RAM."""
        found = b""
        for at, size in self.pieces(gpa, length):
            base, data, _ = self._region(at)
            found += data[at - base : at - base + size]
        if self.log is not None:
            self.log.append((gpa, length))
        if self.armed == 1 and gpa <= self.trigger < gpa + length:
            self._now()
        return bytes(found)

    def _now(self) -> None:
        """The guest's other processor writes."""
        self.armed = 0
        self.write(*self.poke)

    def write(self, gpa: int, data: bytes) -> None:
        """Write within RAM."""
        for at, size in self.pieces(gpa, len(data)):
            base, there, _ = self._region(at)
            there[at - base : at - base + size] = data[:size]
            data = data[size:]
        if self.armed == 2:
            self._now()


class Twins:
    """Both memories, which start alike."""

    def __init__(self) -> None:
        self.plain = PlainMemory()
        self.memory = GuestMemory()
        for base, data, writable in self.plain.regions:
            self.memory.add(base, len(data), readonly=not writable)

    def poke(self, gpa: int, data: bytes) -> None:
        """The guest writes; where it cannot, nothing happens."""
        if self.plain.covers(gpa, len(data), True):
            self.plain.write(gpa, data)
            self.memory.write(gpa, data)

    def check_memory(self) -> None:
        for base, data, _ in self.plain.regions:
            ours = self.memory.read(base, len(data))
            if ours != data:
                at = next(n for n, byte in enumerate(ours) if byte != data[n])
                raise Mismatch(f"memory at {base + at:#x}: the model wrote another byte")
