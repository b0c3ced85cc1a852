"""ACPI's fixed hardware (ACPI 6.5, 4.8.3): power off, a power button, and the PM timer.

The FADT that ``pykvm.arch.x86_64.acpi`` makes tells the guest of them.
"""

from __future__ import annotations

from _thread import allocate_lock

from pykvm.arch.x86_64.pc import PM_CONTROL, PM_EVENT, PM_TIMER, SLEEP_TYPE_OFF
from pykvm.devices.base import ByteDevice, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.devices.bus import Bus
    from pykvm.devices.claim import Claim

STATUS, ENABLE, CONTROL = PM_EVENT, PM_EVENT + 2, PM_CONTROL
"""Offsets of the registers of 16 bits."""

POWER_BUTTON = 1 << 8
"""Of PM1 status and enable. Nothing else ever happens."""
ENABLES = 1 << 0 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10

SCI_ENABLED = 1 << 0
"""Of PM1 control: the machine is in ACPI mode, always."""
SLEEP_TYPE_SHIFT, SLEEP_TYPE_MASK = 10, 7
SLEEP_ENABLE = 1 << 13

TIMER_HZ = 3_579_545


class PowerManagement(ByteDevice):
    """The PM1a blocks and the PM timer, 12 ports. The timer is served in C.

    Args:
        on_power_off: is called with the sleep type (``SLEEP_TYPE_OFF``) when the guest turns itself
            off.
        on_sci: drives the system control interrupt (GSI 9), a level line: is called with 1 and 0.
            None: the power button has no effect.
    """

    LENGTH = 8

    def __init__(
        self,
        on_power_off: Callable[[int], object],
        *,
        on_sci: Callable[[int], object] | None = None,
    ) -> None:
        super().__init__()
        self._on_power_off = on_power_off
        self._on_sci = on_sci
        self._lock = allocate_lock()
        self._status = self._enable = self._control = 0
        self._sci = 0
        self._timer: Claim | None = None

    def attach(self, bus: Bus, first: int) -> Claim:
        """Claim 12 ports from ``first`` on."""
        self._timer = self._keep(bus.clock(first + PM_TIMER, TIMER_HZ))
        return super().attach(bus, first)

    def press_power_button(self) -> None:
        """Ask the guest to shut down, from any thread. What it makes of it is its own affair."""
        with self._lock:
            self._status |= POWER_BUTTON
            self._update()

    def read(self, offset: int) -> int:
        """One byte of a PM1 register."""
        register = {STATUS: self._status, ENABLE: self._enable}.get(
            offset & ~1, self._control | SCI_ENABLED
        )
        if offset >= CONTROL + 2:
            return 0
        return register >> 8 * (offset & 1) & 0xFF

    def write(self, offset: int, value: int) -> None:
        """One byte of a PM1 register; status bits are cleared by writing 1."""
        shift = 8 * (offset & 1)
        keep = 0xFF00 >> shift
        value <<= shift
        with self._lock:
            if offset & ~1 == STATUS:
                self._status &= ~value
            elif offset & ~1 == ENABLE:
                self._enable = self._enable & keep | value & ENABLES
            elif offset & ~1 == CONTROL:
                self._control = (self._control & keep | value) & ~SLEEP_ENABLE
            self._update()
        sleep = offset & ~1 == CONTROL and value & SLEEP_ENABLE
        if sleep and self._control >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK == SLEEP_TYPE_OFF:
            self._on_power_off(SLEEP_TYPE_OFF)

    def _update(self) -> None:
        level = int(bool(self._status & self._enable))
        if level != self._sci and self._on_sci is not None:
            self._sci = level
            self._on_sci(level)

    def state(self) -> State:
        """The registers; the timer in ticks."""
        timer = self._timer.device.now() if self._timer is not None else 0
        return {
            "status": self._status,
            "enable": self._enable,
            "control": self._control,
            "sci": self._sci,
            "timer": timer,
        }

    def restore(self, state: State) -> None:
        """Take over what :meth:`state` returned; the timer runs on from there."""
        self._status, self._enable = state["status"], state["enable"]
        self._control, self._sci = state["control"], state["sci"]
        if self._timer is not None:
            self._timer.device.set(state["timer"])
