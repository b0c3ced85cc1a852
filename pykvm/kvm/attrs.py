"""Device attributes: numbered values by group, which devices, VMs, vCPUs and KVM itself have."""

from __future__ import annotations

import errno

from pykvm._abi import ffi
from pykvm.errors import KvmError

from .handle import Handle
from .ioctl import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .handle import BytesLike


def _attr(group: int, attr: int, flags: int, buffer: Any = None) -> Any:
    addr = 0 if buffer is None else int(ffi.cast("uintptr_t", buffer))
    return ffi.new(
        "struct kvm_device_attr *", {"flags": flags, "group": group, "attr": attr, "addr": addr}
    )


class AttrReader(Handle):
    """The attribute ioctls that every kind of file descriptor has: HAS and GET."""

    __slots__ = ()

    def _need_attrs(self) -> None:
        """Raise CapabilityError where attributes of this kind are a capability."""

    def has_device_attr(self, group: int, attr: int, flags: int = 0) -> bool:
        """KVM_HAS_DEVICE_ATTR (api.rst 4.81): whether the attribute exists here.

        It says nothing of whether it can be read, written, or both. A VM needs
        KVM_CAP_VM_ATTRIBUTES, a vCPU KVM_CAP_VCPU_ATTRIBUTES, the system KVM_CAP_SYS_ATTRIBUTES.
        """
        self._need_attrs()
        try:
            call(self, "KVM_HAS_DEVICE_ATTR", _attr(group, attr, flags))
        except KvmError as error:
            if error.errno == errno.ENXIO:
                return False
            raise
        return True

    def get_device_attr(self, group: int, attr: int, size: int = 8, flags: int = 0) -> bytes:
        """KVM_GET_DEVICE_ATTR (api.rst 4.80): the attribute's value.

        Args:
            group: the device's own group number.
            attr: the group's own attribute number.
            size: length of the value in bytes, as the attribute is documented. KVM does not say
                how much it writes: too small a size is an overrun of the buffer, so 4 KiB of
                slack follow it.
            flags: none are defined.

        Returns: ``size`` bytes in host byte order.

        Errors: ENXIO if there is no such group or attribute; EPERM if it cannot be read now.
        """
        self._need_attrs()
        buffer = ffi.new("char[]", size + 4096)
        call(self, "KVM_GET_DEVICE_ATTR", _attr(group, attr, flags, buffer))
        return bytes(ffi.buffer(buffer, size))


class AttrWriter(AttrReader):
    """The attribute ioctls of what can also be written: devices, VMs and vCPUs."""

    __slots__ = ()

    def set_device_attr(
        self, group: int, attr: int, value: BytesLike = b"", flags: int = 0
    ) -> None:
        """KVM_SET_DEVICE_ATTR (api.rst 4.80): give the attribute a value.

        Args:
            group: the device's own group number.
            attr: the group's own attribute number.
            value: the bytes, of the length the attribute is documented to have, in host order.
            flags: none are defined.

        Errors: ENXIO if there is no such group or attribute; EPERM if it cannot be written now;
        EBUSY if it is too late.
        """
        self._need_attrs()
        # KVM reads as much as the attribute has: a value cut short must not become a read of
        # foreign memory.
        buffer = ffi.new("char[]", bytes(value) + bytes(64))
        call(self, "KVM_SET_DEVICE_ATTR", _attr(group, attr, flags, buffer))
