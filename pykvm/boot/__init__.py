"""Put kernels into guest memory: Linux, PVH, multiboot, static ELF executables, flat binaries.

Nothing here knows KVM: a loader gets guest memory, checks the image before it writes the first
byte, and returns a plain description of how to enter it.

- ``load``      any kernel, with initrd and command line: a ``BootPlan``
- ``layout``    every address, explained
- ``linux``     bzImage and vmlinux by Linux's 64-bit boot protocol; ``params`` is its zero page
- ``bzimage``   the file's header; ``unpack`` its payload; ``cache`` keeps what was unpacked
- ``pvh``       by a Xen note; ``multiboot`` by multiboot 1
- ``elf``       ELF files themselves; ``flat`` bytes at an address
- ``e820``      the memory map that all of them pass on
- ``placement`` who gets which addresses; ``image`` what goes there
"""

from __future__ import annotations

from pykvm.boot import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.boot.loader import load
    from pykvm.boot.plan import BootPlan

__all__ = ["BootPlan", "layout", "load"]

_LATER = {"load": "loader", "BootPlan": "plan"}


def __getattr__(name: str) -> Any:
    """Load what a tiny guest does not need when it is first asked for."""
    if name in _LATER:
        from importlib import import_module

        value = getattr(import_module(f"pykvm.boot.{_LATER[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pykvm.boot' has no attribute {name!r}")
