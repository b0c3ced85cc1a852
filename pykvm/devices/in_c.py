"""Small devices whose registers C serves: a clock, a latch of bits, PCI's configuration ports.

A bus claims addresses for them: ``Bus.clock()``, ``Bus.latch()``, ``Bus.pci()``.
"""

from __future__ import annotations

import time

from pykvm._abi import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Clock:
    """A counter that runs at a fixed rate, from 0 when it was made.

    Attributes:
        hz: its rate.
        c: the ``struct pykvm_clock``.
    """

    __slots__ = ("c", "hz")

    def __init__(self, hz: int) -> None:
        if not 0 < hz < 1 << 64:
            raise ValueError(f"a clock runs at 1..{(1 << 64) - 1} Hz, not {hz}")
        self.hz = hz
        self.c = ffi.new("struct pykvm_clock *", {"hz": hz})
        self.set(0)

    def now(self) -> int:
        """What a guest would read, without regard to the width."""
        return int(lib.pykvm_clock_read(self.c))

    def set(self, ticks: int) -> None:
        """Have it show ``ticks`` now, and run on from there."""
        self.c.base = ticks
        self.c.start = time.monotonic_ns()

    def state(self) -> dict[str, Any]:
        """What it shows."""
        return {"ticks": self.now()}

    def restore(self, state: dict[str, Any]) -> None:
        """Run on from there."""
        self.set(state["ticks"])


class Latch:
    """Bits that a device sets and a guest takes back, as interrupt status registers have them.

    Attributes:
        c: the ``struct pykvm_latch``.
    """

    __slots__ = ("c",)

    def __init__(self) -> None:
        self.c = ffi.new("struct pykvm_latch *")

    @property
    def bits(self) -> int:
        """The bits that are set."""
        return int(self.c.bits)

    @bits.setter
    def bits(self, bits: int) -> None:
        self.c.bits = bits

    def set(self, bits: int) -> None:
        """Set bits, beside those that are; from any thread."""
        lib.pykvm_latch_set(self.c, bits)

    def state(self) -> dict[str, Any]:
        """The bits."""
        return {"bits": self.bits}

    def restore(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.bits = state["bits"]


class PciPorts:
    """What C reads of PCI's configuration space: function 0 of 32 devices on bus 0.

    Attributes:
        c: the ``struct pykvm_pci``.
    """

    __slots__ = ("_kept", "c")

    def __init__(self) -> None:
        self.c = ffi.new("struct pykvm_pci *")
        self._kept: dict[int, Any] = {}

    @property
    def address(self) -> int:
        """The address register."""
        return int(self.c.address)

    @address.setter
    def address(self, value: int) -> None:
        self.c.address = value

    def show(self, device: int, config: bytearray, live: int = 0) -> None:
        """Have C answer reads from the 256 bytes of ``config``, but for the 4 from ``live`` on."""
        if len(config) != 256:
            raise ValueError(f"a configuration space has 256 bytes, not {len(config)}")
        self._kept[device] = found = ffi.from_buffer("uint8_t[]", config, require_writable=True)
        self.c.live[device] = live
        self.c.config[device] = found
