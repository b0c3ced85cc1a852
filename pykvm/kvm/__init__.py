"""KVM itself: ``/dev/kvm`` as objects, one method an ioctl, nothing hidden.

A :class:`Kvm` makes a :class:`Vm`, that makes a :class:`Vcpu` or a :class:`Device`; each wraps one
kind of file descriptor, and each of its ioctls is the method of the same name in lower case. The
structures are cffi objects of the kernel's own names and fields. Every constant of
linux/kvm.h is an attribute of this module: ``pykvm.kvm.KVM_CAP_SYNC_REGS``.

What a KVM does not have raises :class:`~pykvm.errors.CapabilityError`, what it refuses
:class:`~pykvm.errors.KvmError`. :func:`trace` prints every ioctl.
"""

from __future__ import annotations

from . import ioctl
from .flex import MsrError, new_cpuid2
from .system import Kvm
from .vcpu import Vcpu
from .vm import Vm
from .vm_filters import MsrRange
from .vm_irq import irqchip_route, msi_route

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from . import exits
    from .device import Device
    from .tracing import trace

__all__ = [
    "Device",
    "Kvm",
    "MsrError",
    "MsrRange",
    "Vcpu",
    "Vm",
    "exits",
    "ioctl",
    "irqchip_route",
    "msi_route",
    "new_cpuid2",
    "trace",
]

#: How the constants of linux/kvm.h begin.
_CONSTANTS = ("KVM_", "MSR_KVM_", "GUEST_MEMFD_")

#: Loaded when first asked for.
_SUBMODULES = ("caps", "decode", "exclusions", "exits", "hints", "rings", "stats", "tracing")

_LATER = {"Device": "device", "trace": "tracing"}


def __getattr__(name: str) -> Any:
    if name.startswith(_CONSTANTS):
        from pykvm._abi import lib

        try:
            return getattr(lib, name)
        except AttributeError:
            raise AttributeError(f"linux/kvm.h has no {name}") from None
    if name in _SUBMODULES:
        from importlib import import_module

        return import_module(f"{__name__}.{name}")
    if name in _LATER:
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from pykvm._abi import lib

    constants = [name for name in dir(lib) if name.startswith(_CONSTANTS)]
    return sorted({*globals(), *__all__, *_SUBMODULES, *constants})
