"""pykvm: KVM, scripted. Tiny guests from Python at the speed of C.

::

    import pykvm

    with pykvm.Machine(memory="2M") as m:
        m.load(pykvm.asm("mov al,'H'; out 0xe9,al; hlt", mode="long64"), at=0x8000)
        m.cpu.enter("long64", entry=0x8000)
        m.on_pio(0xE9, lambda exit: print(chr(exit.value), end=""))
        result = m.run(timeout=0.5)

Below the machine, :mod:`pykvm.kvm` has every ioctl under its own name.
"""

from __future__ import annotations

from pykvm.cpu import Cpu
from pykvm.errors import (
    AsmError,
    BootError,
    BusOverlapError,
    BusyError,
    CapabilityError,
    ClosedError,
    DiskError,
    GuestError,
    GuestMemoryError,
    KvmError,
    PykvmError,
    ReplayError,
    RunError,
    SnapshotError,
    VcpuExitError,
)
from pykvm.machine import Machine
from pykvm.memory import GuestMemory
from pykvm.result import RunResult

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.assembler import Code, asm
    from pykvm.debug.input_log import InputLog
    from pykvm.pool import Pool
    from pykvm.snapshots import Snapshot

__version__ = "0.1.0"

__all__ = [
    "AsmError",
    "BootError",
    "BusOverlapError",
    "BusyError",
    "CapabilityError",
    "ClosedError",
    "Code",
    "Cpu",
    "DiskError",
    "GuestError",
    "GuestMemory",
    "GuestMemoryError",
    "InputLog",
    "KvmError",
    "Machine",
    "Pool",
    "PykvmError",
    "ReplayError",
    "RunError",
    "RunResult",
    "Snapshot",
    "SnapshotError",
    "VcpuExitError",
    "__version__",
    "asm",
]

_MODULES = (
    "virtio",
    "vmcore",
)
_LATER = {
    "Code": "assembler",
    "InputLog": "debug.input_log",
    "Pool": "pool",
    "Snapshot": "snapshots",
    "asm": "assembler",
}


def __getattr__(name: str) -> Any:
    """Load what a script may not need when it is first asked for."""
    if name in _MODULES:
        from importlib import import_module

        return import_module(f"pykvm.{name}")
    if name in _LATER:
        from importlib import import_module

        value = getattr(import_module(f"pykvm.{_LATER[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pykvm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
