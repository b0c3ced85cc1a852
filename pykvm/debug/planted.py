"""Stops planted in the guest's code: one byte each, IN AL,DX, in place of an instruction's first.

It is the one place that writes such bytes, and knows what was there before. Who copies the guest's
memory (a snapshot) does it ``with planted.lifted():``, and who writes it from such a copy calls
:meth:`Planted.put_back` afterwards: planted bytes are no part of the guest.

Why this instruction: docs/debugging.md. C looks whether an exit may be of one of them
(``csrc/watch.c``), :class:`~pykvm.debug.debugger.Debugger` what it means.
"""

from __future__ import annotations

from bisect import bisect_left

from pykvm._abi import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from pykvm.memory import GuestMemory

IN_AL_DX = 0xEC
_PAGE = 0x1000
_MOST_NOTED = 1 << 16
_MOST_FOLLOWED = 64
_POINTER = ffi.sizeof("uint8_t *")
_IN = frozenset((0x6C, 0xE4, 0xEC))
"""Opcodes of instructions that read one byte from a port."""
_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3,
                       *range(0x40, 0x50)))  # fmt: skip


class Planted:
    """The planted bytes of one guest.

    Several may want a stop at the same place: it is planted once, and stays until the last of them
    has removed it. Iteration gives ``(gpa, the byte that belongs there)``.

    Args:
        memory: the guest's memory.
        vcpus: its ``struct pykvm_vcpu *``, which are told where stops may be.

    Attributes:
        changed: where stops were planted or taken away, the latest last, for who keeps a list of
            its own. It does not grow for ever: another list takes its place.
        renewed: how often a stop was planted, or the byte that belongs there became another.
    """

    def __init__(self, memory: GuestMemory, vcpus: Iterable[Any]) -> None:
        self._memory = memory
        self._vcpus = list(vcpus)
        self._users: dict[int, int] = {}
        self._originals: dict[int, int] = {}
        self._lifted: set[int] = set()
        self._gone: set[int] = set()
        self.changed: list[int] = []
        self.renewed = 0
        self._c = ffi.new("struct pykvm_planted *")
        self._at_offset = [0] * _PAGE

    def __contains__(self, gpa: object) -> bool:
        return gpa in self._originals

    def __len__(self) -> int:
        return len(self._originals)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(sorted(self._originals.items()))

    def stops_at(self, gpa: int | None) -> bool:
        """Whether an IN at ``gpa`` is a planted one. While that is lifted it is the guest's own."""
        return gpa in self._originals and gpa not in self._lifted

    def was_at(self, gpa: int) -> bool:
        """Whether an IN at ``gpa`` is one that was taken away as a vCPU came to it."""
        if gpa not in self._gone:
            return False
        code = self._memory.read(gpa, min(16, _PAGE - gpa % _PAGE))
        return next((byte for byte in code if byte not in _PREFIXES), 0) not in _IN

    def settle(self) -> None:
        """No vCPU runs: none has an exit left of a stop that is not there any more."""
        if self._gone and not any(c.access.pending == lib.PYKVM_UNSERVED for c in self._vcpus):
            gone, self._gone = self._gone, set()
            for gpa in gone:
                self._mark(gpa, -1)

    def plant(self, gpa: int) -> None:
        """Put a stop at a guest-physical address, or count one more who wants it.

        Raises:
            GuestMemoryError: there is no memory.
        """
        users = self._users.get(gpa, 0)
        if not users:
            self._originals[gpa] = self._memory[gpa]
            self._lifted.discard(gpa)
            self.renewed += 1
            self._note(gpa)
            self._mark(gpa, 1)
            self._poke(gpa, IN_AL_DX)  # last of all: another vCPU may come to it at once
        self._users[gpa] = users + 1

    def remove(self, gpa: int) -> None:
        """Take a stop away once nobody wants it any longer; nothing where there is none."""
        users = self._users.get(gpa, 0)
        if users > 1:
            self._users[gpa] = users - 1
        elif users:
            del self._users[gpa]
            original = self._originals.pop(gpa)
            self._note(gpa)
            if gpa in self._gone:
                self._mark(gpa, -1)
            else:  # a vCPU may have come to it in this moment: C is to tell of that
                self._gone.add(gpa)
            lifted = gpa in self._lifted
            self._lifted.discard(gpa)
            # Else the guest has written its code anew, or is no more.
            if not lifted and not self._memory.closed and self._memory[gpa] == IN_AL_DX:
                self._poke(gpa, original)

    def clear(self) -> None:
        """Take all of them away."""
        for gpa in list(self._originals):
            self._users[gpa] = 1
            self.remove(gpa)

    def lifted(self, gpas: Iterable[int] | None = None) -> Lifted:
        """For the length of a ``with``: memory as the guest knows it, everywhere or at places."""
        return Lifted(self, None if gpas is None else tuple(gpas))

    def lift(self, gpas: Iterable[int] | None = None) -> None:
        """Write the guest's own bytes; what it has written itself meanwhile is taken for those."""
        for gpa in list(self._originals) if gpas is None else gpas:
            if gpa in self._originals and self._memory[gpa] == IN_AL_DX:
                self._poke(gpa, self._originals[gpa])
            self._lifted.add(gpa)

    def put_back(self, gpas: Iterable[int] | None = None) -> None:
        """Plant all again after :meth:`lift`, or after memory was written from a copy.

        The bytes that are there now are the guest's own from here on, but for an IN AL,DX where
        none was lifted: that is taken for the planted one.
        """
        for gpa in list(self._originals) if gpas is None else gpas:
            lifted = gpa in self._lifted
            self._lifted.discard(gpa)
            if gpa in self._originals:
                now = self._memory[gpa]
                if lifted or now != IN_AL_DX:
                    self._belongs(gpa, now)
                    self._poke(gpa, IN_AL_DX)

    def hide(self, gpa: int, data: bytes) -> bytes:
        """``data``, which was read at ``gpa``, with the guest's own bytes in it."""
        hidden = None
        for at, original in self._originals.items():
            if gpa <= at < gpa + len(data) and data[at - gpa] == IN_AL_DX:
                hidden = hidden or bytearray(data)
                hidden[at - gpa] = original
        return data if hidden is None else bytes(hidden)

    def wrote(self, gpa: int, data: bytes) -> None:
        """``data`` was written at ``gpa``, as the guest's own: stops that it covers stay."""
        for at in self._originals:
            if gpa <= at < gpa + len(data):
                self._belongs(at, data[at - gpa])
                self._poke(at, IN_AL_DX)

    def _belongs(self, gpa: int, byte: int) -> None:
        if self._originals[gpa] != byte:
            self._originals[gpa] = byte
            self.renewed += 1

    def _note(self, gpa: int) -> None:
        if len(self.changed) >= _MOST_NOTED:
            self.changed = []
        self.changed.append(gpa)

    def host(self, gpa: int) -> int:
        """Where in this process a byte of the guest's memory is."""
        region = self._memory.region_at(gpa)
        address: int = region.userspace_addr + gpa - region.guest_phys_addr
        return address

    def _poke(self, gpa: int, byte: int) -> None:
        """Write a byte, also of ROM, past what keeps account of writes: it is not the guest's."""
        ffi.cast("uint8_t *", self.host(gpa))[0] = byte

    def _mark(self, gpa: int, step: int) -> None:
        """Count the stops at an offset, and tell C which offsets have one."""
        offset = gpa % _PAGE
        self._at_offset[offset] += step
        bit = 1 << offset % 64
        if self._at_offset[offset]:
            self._c.offsets[offset // 64] |= bit
        else:
            self._c.offsets[offset // 64] &= ~bit
        for c in self._vcpus:
            c.planted = self._c if self._originals or self._gone else ffi.NULL


class Lifted:
    """What :meth:`Planted.lifted` gives."""

    __slots__ = ("_gpas", "_planted")

    def __init__(self, planted: Planted, gpas: tuple[int, ...] | None) -> None:
        self._planted = planted
        self._gpas = gpas

    def __enter__(self) -> None:
        self._planted.lift(self._gpas)

    def __exit__(self, *exc: object) -> None:
        self._planted.put_back(self._gpas)


class Ordered:
    """The planted places as C plants them with a reset: where they are in this process, in order.

    What it costs to follow a change does not grow with their number.

    Args:
        planted: those.
    """

    def __init__(self, planted: Planted) -> None:
        self._planted = planted
        self._changed: list[int] | None = None
        self._seen = 0
        self._places: list[int] = []
        self._c: Any = None

    def give(self, reset: Any) -> None:
        """Have resets by a ``struct pykvm_reset *`` plant them, as they are now."""
        changed = self._planted.changed
        if changed is not self._changed or len(changed) - self._seen > _MOST_FOLLOWED:
            self._begin()
        else:
            for gpa in changed[self._seen :]:
                self._follow(gpa)
        self._changed, self._seen = changed, len(changed)
        reset.plants, reset.plant_count, reset.plant = self._c, len(self._places), IN_AL_DX

    def _begin(self) -> None:
        self._places = sorted(self._planted.host(gpa) for gpa, _ in self._planted)
        self._c = ffi.new("uint8_t *[]", [ffi.cast("uint8_t *", each) for each in self._places])

    def _follow(self, gpa: int) -> None:
        place, places = self._planted.host(gpa), self._places
        at = bisect_left(places, place)
        there = at < len(places) and places[at] == place
        if there and gpa not in self._planted:
            del places[at]
            ffi.memmove(self._c + at, self._c + at + 1, (len(places) - at) * _POINTER)
        elif not there and gpa in self._planted:
            self._begin()
