"""Devices that a guest of :mod:`pykvm.guestlib` may ask for beside its machine."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.machine import Machine

_COUNTER_PORT, _COUNTER_SCRATCH, _COUNTER_WINDOW = 0x510, 0x51C, 0xD0000000


def add_virtio(machine: Machine, name: str, console: Callable[[bytes], object] | None) -> None:
    """Give a machine ``"rng"`` or ``"console"``, served by its vCPU; ``console`` gets what
    the guest prints there.
    """
    from pykvm.virtio import Console, Rng

    if name == "rng":
        machine.virtio(Rng(), io="sync")
    elif name == "console":
        machine.virtio(Console(output=console), io="sync")
    else:
        raise ValueError(f'a guest has the virtio devices "rng" and "console", not {name!r}')


class ExitCounter:
    """The device of guests/exits: counts three kinds of exits and tells the guest.

    Port 0x51c and 0xd0000000..0xd0000fff are there to be accessed; ports 0x510, 0x514 and 0x518
    read as the number of accesses to the one, to the other, and of HLTs, after each of which the
    guest goes on.
    """

    def __init__(self, machine: Machine) -> None:
        self.pio = self.mmio = self.hlt = 0
        machine.on_pio(_COUNTER_PORT, self._report, count=12)
        machine.on_pio(_COUNTER_SCRATCH, self._count_pio, count=4)
        machine.on_mmio(_COUNTER_WINDOW, 0x1000, self._count_mmio)
        machine.on_hlt(self._count_hlt)

    def _report(self, access: Any) -> int:
        return (self.pio, self.mmio, self.hlt)[(access.port - _COUNTER_PORT) // 4]

    def _count_pio(self, access: Any) -> int:
        self.pio += 1
        return 0

    def _count_mmio(self, access: Any) -> int:
        self.mmio += 1
        return 0

    def _count_hlt(self, exit: Any) -> None:
        self.hlt += 1
