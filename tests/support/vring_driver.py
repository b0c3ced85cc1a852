"""The driver's side of a split virtqueue, as a guest has it, for tests of devices."""

from __future__ import annotations

from collections.abc import Sequence
from struct import pack, unpack_from

from pykvm.memory import GuestMemory

NEXT, WRITE, INDIRECT = 1, 2, 4

Buffer = tuple[int, int, int]
"""(gpa, length, flags); NEXT is set where it has to be."""


class Driver:
    """A ring in guest memory. Nothing here is checked: a test may want it broken."""

    def __init__(
        self,
        memory: GuestMemory,
        size: int = 8,
        *,
        desc: int = 0x1000,
        driver: int = 0x2000,
        device: int = 0x3000,
        event_idx: bool = False,
    ) -> None:
        self.memory = memory
        self.size = size
        self.desc, self.driver, self.device = desc, driver, device
        self.event_idx = event_idx
        self.index = 0
        self.taken = 0

    def descriptor(
        self, number: int, gpa: int, length: int, flags: int = 0, next: int = 0, table: int = 0
    ) -> None:
        """Write a descriptor, of the ring or of an indirect table."""
        at = (table or self.desc) + 16 * number
        self.memory.write(at, pack("<QIHH", gpa, length, flags & 0xFFFF, next & 0xFFFF))

    def chain(self, buffers: Sequence[Buffer], first: int = 0, table: int = 0) -> None:
        """Write a chain of descriptors one after the other, from number ``first`` on."""
        for number, (gpa, length, flags) in enumerate(buffers, first):
            last = number == first + len(buffers) - 1
            self.descriptor(
                number, gpa, length, flags | (0 if last else NEXT), number + 1, table=table
            )

    def offer(self, head: int = 0) -> None:
        """Make a chain available."""
        self.memory.u16[self.driver + 4 + 2 * (self.index % self.size)] = head
        self.index = (self.index + 1) % 65536
        self.memory.u16[self.driver + 2] = self.index

    def send(self, *buffers: Buffer, first: int = 0) -> None:
        """Write a chain and make it available."""
        self.chain(buffers, first)
        self.offer(first)

    def used(self) -> list[tuple[int, int]]:
        """What the device has given back since this was asked last: (head, written)."""
        index = self.memory.u16[self.device + 2]
        found = []
        while self.taken != index:
            at = self.device + 4 + 8 * (self.taken % self.size)
            head, written = unpack_from("<II", self.memory.read(at, 8))
            found.append((head, written))
            self.taken = (self.taken + 1) % 65536
        return found

    def want_interrupt_at(self, index: int) -> None:
        """EVENT_IDX: ask for an interrupt when the used index passes ``index``."""
        self.memory.u16[self.driver + 4 + 2 * self.size] = index

    def no_interrupts(self, flag: int = 1) -> None:
        """Without EVENT_IDX: ask for none."""
        self.memory.u16[self.driver] = flag

    @property
    def notify_at(self) -> int:
        """EVENT_IDX: the index at which the device wants its doorbell."""
        return self.memory.u16[self.device + 4 + 8 * self.size]

    @property
    def quiet(self) -> bool:
        """Without EVENT_IDX: whether the device wants no doorbell."""
        return bool(self.memory.u16[self.device] & 1)
