"""The chipset's ways to reset a PC: the reset control register 0xcf9, and port 0x92."""

from __future__ import annotations

from pykvm.devices.base import ByteDevice, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class _ResetBit(ByteDevice):
    """One register; a bit of it that goes from 0 to 1 resets the machine."""

    NAME = ""
    BIT = 0
    WRITABLE = 0
    FIRST = 0

    def __init__(self, on_reset: Callable[[str], object]) -> None:
        super().__init__()
        self._on_reset = on_reset
        self._value = self.FIRST

    def read(self, offset: int) -> int:
        """What was written last."""
        return self._value

    def write(self, offset: int, value: int) -> None:
        """Reset the machine if the bit rises; then the register is as after power-on."""
        rises = value & ~self._value & self.BIT
        self._value = self.FIRST if rises else value & self.WRITABLE
        if rises:
            self._on_reset(self.NAME)

    def state(self) -> State:
        """The register."""
        return {"value": self._value}

    def restore(self, state: State) -> None:
        """Take over what :meth:`state` returned."""
        self._value = state["value"]


class ResetControl(_ResetBit):
    """Intel's reset control register: bit 2 resets, bits 1 and 3 say how thoroughly.

    Args:
        on_reset: is called with ``"0xcf9"``.
    """

    NAME = "0xcf9"
    BIT = 1 << 2
    WRITABLE = 0b1110


class FastA20(_ResetBit):
    """Port 0x92: bit 0 resets the processor. Bit 1 is the A20 gate, which is always open here.

    Args:
        on_reset: is called with ``"port92"``.
    """

    NAME = "port92"
    BIT = 1 << 0
    WRITABLE = 0b10
    FIRST = 0b10
