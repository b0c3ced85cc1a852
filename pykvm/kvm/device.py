"""In-kernel devices made by KVM_CREATE_DEVICE."""

from __future__ import annotations

from .attrs import AttrWriter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .vm import Vm


class Device(AttrWriter):
    """A device that KVM emulates for one VM (``Vm.create_device``), driven by its attributes.

    On x86-64 the only type is KVM_DEV_TYPE_VFIO, whose attributes are in the kernel's
    ``Documentation/virt/kvm/devices/vfio.rst``.
    """

    __slots__ = ("type", "vm")

    kind = "device"

    def __init__(self, vm: Vm, fd: int, type: int) -> None:
        super().__init__(fd)
        #: The VM it belongs to.
        self.vm = vm
        #: ``KVM_DEV_TYPE_*``.
        self.type = type
