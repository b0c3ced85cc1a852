"""A virtual machine: the ioctls of its file descriptor.

Memory is in :mod:`pykvm.kvm.vm_memory`, interrupts in :mod:`pykvm.kvm.vm_irq`, what a guest may
touch of MSRs and counters in :mod:`pykvm.kvm.vm_filters`.
"""

from __future__ import annotations

from pykvm._abi import ffi, lib

from .attrs import AttrWriter
from .flex import get, new_enable_cap, pointer
from .ioctl import call, call_int
from .vcpu import Vcpu
from .vm_filters import FilterMixin
from .vm_irq import IrqMixin
from .vm_memory import MemoryMixin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .device import Device
    from .stats import Stats
    from .system import Kvm


class Vm(MemoryMixin, IrqMixin, FilterMixin, AttrWriter):
    """A virtual machine (``Kvm.create_vm``).

    KVM keeps a VM alive as long as a file descriptor of it, of its vCPUs or devices, or a mapping
    of a run page is: closing is in any order, and tidiest from the vCPUs upward.
    """

    __slots__ = ("kvm", "type")

    kind = "vm"

    def __init__(self, kvm: Kvm, fd: int, type: int = 0) -> None:
        super().__init__(fd, kvm._caps_of(type))
        self._slot_pages = {}
        #: The KVM it was made by.
        self.kvm = kvm
        #: ``KVM_X86_*_VM``; 0 is an ordinary VM.
        self.type = type

    def create_vcpu(self, id: int) -> Vcpu:
        """KVM_CREATE_VCPU (api.rst 4.7): add a vCPU, in its state at power-on.

        Args:
            id: the vCPU's, which is its APIC ID; below KVM_CAP_MAX_VCPU_ID. vCPU 0 is the
                bootstrap processor, see :meth:`set_boot_cpu_id`.

        Errors: EEXIST if the id is taken; EINVAL if it or the number of vCPUs is too large.
        """
        return Vcpu(self, call_int(self, "KVM_CREATE_VCPU", id), id)

    def create_device(self, type: int, flags: int = 0) -> Device | None:
        """KVM_CREATE_DEVICE (api.rst 4.79): make an in-kernel device.

        Args:
            type: ``KVM_DEV_TYPE_*``.
            flags: KVM_CREATE_DEVICE_TEST only asks whether the type exists.

        Returns: the device; None from a test that succeeded. Needs KVM_CAP_DEVICE_CTRL.

        Errors: ENODEV for a type this KVM does not have; EEXIST or EBUSY for a second one of a
        type that may exist only once.
        """
        from .device import Device

        self.need("KVM_CAP_DEVICE_CTRL")
        args = ffi.new("struct kvm_create_device *", {"type": type, "flags": flags})
        call(self, "KVM_CREATE_DEVICE", args)
        return None if flags & lib.KVM_CREATE_DEVICE_TEST else Device(self, args.fd, type)

    def enable_cap(self, cap: int | str, *args: int, flags: int = 0) -> int:
        """KVM_ENABLE_CAP (api.rst 4.37, chapter 7): switch a capability on for this VM.

        Args:
            cap: a ``KVM_CAP_*`` number, or its name.
            args: up to four 64-bit arguments, as the capability defines them.
            flags: none are defined.

        Returns: what the capability returns, mostly 0. Needs KVM_CAP_ENABLE_CAP_VM.

        Errors: EINVAL for a capability that cannot be enabled, here or so late (many only before
        the first vCPU), or not with these arguments.
        """
        self.need("KVM_CAP_ENABLE_CAP_VM")
        return call(self, "KVM_ENABLE_CAP", new_enable_cap(cap, args, flags))

    def set_tss_addr(self, addr: int) -> None:
        """KVM_SET_TSS_ADDR (api.rst 4.36): where KVM may hide three pages for real mode.

        Intel processors without unrestricted guest need it; elsewhere it does nothing.

        Args:
            addr: guest-physical, below 4 GiB - 12 KiB, where neither memory nor devices are.

        Needs KVM_CAP_SET_TSS_ADDR. Errors: EINVAL if addr is too high.
        """
        self.need("KVM_CAP_SET_TSS_ADDR")
        call_int(self, "KVM_SET_TSS_ADDR", addr)

    def set_identity_map_addr(self, addr: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR (api.rst 4.40): where KVM may hide one page table.

        Intel processors without unrestricted guest need it; before the first vCPU.

        Args:
            addr: guest-physical, below 4 GiB, where neither memory nor devices are; 0 is the
                default, 0xfffbc000.

        Needs KVM_CAP_SET_IDENTITY_MAP_ADDR. Errors: EINVAL once there is a vCPU.
        """
        self.need("KVM_CAP_SET_IDENTITY_MAP_ADDR")
        call(self, "KVM_SET_IDENTITY_MAP_ADDR", ffi.new("uint64_t *", addr))

    def set_boot_cpu_id(self, vcpu_id: int) -> None:
        """KVM_SET_BOOT_CPU_ID (api.rst 4.41): which vCPU is the bootstrap processor; else 0.

        Before the first vCPU. Needs KVM_CAP_SET_BOOT_CPU_ID. Errors: EBUSY once there is a vCPU.
        """
        self.need("KVM_CAP_SET_BOOT_CPU_ID")
        call_int(self, "KVM_SET_BOOT_CPU_ID", vcpu_id)

    def get_clock(self) -> Any:
        """KVM_GET_CLOCK (api.rst 4.29): the guest's kvmclock.

        Returns: ``struct kvm_clock_data *``: ``clock`` in ns; ``flags`` say which of ``realtime``
        (ns since 1970) and ``host_tsc`` hold values. Needs KVM_CAP_ADJUST_CLOCK.
        """
        self.need("KVM_CAP_ADJUST_CLOCK")
        return get(self, "KVM_GET_CLOCK", "struct kvm_clock_data *")

    def set_clock(self, data: Any) -> None:
        """KVM_SET_CLOCK (api.rst 4.30): set the guest's kvmclock.

        Args:
            data: ``struct kvm_clock_data``, or the clock in ns. With KVM_CLOCK_REALTIME in
                ``flags`` KVM adds what time passed since ``realtime``: clear it if that is not
                meant, for :meth:`get_clock` may have set it.

        Needs KVM_CAP_ADJUST_CLOCK. Errors: EINVAL for a flag that this KVM does not have.
        """
        self.need("KVM_CAP_ADJUST_CLOCK")
        if isinstance(data, int):
            data = ffi.new("struct kvm_clock_data *", {"clock": data})
        call(self, "KVM_SET_CLOCK", pointer(data, "struct kvm_clock_data *"))

    def set_tsc_khz(self, tsc_khz: int) -> None:
        """KVM_SET_TSC_KHZ (api.rst 4.55) of a VM: the TSC frequency of vCPUs made from now on.

        Args:
            tsc_khz: in kHz; 0 is the host's.

        Needs KVM_CAP_VM_TSC_CONTROL. Errors: EINVAL if the host cannot scale to it, or once
        there is a vCPU.
        """
        self.need("KVM_CAP_VM_TSC_CONTROL")
        call_int(self, "KVM_SET_TSC_KHZ", tsc_khz)

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ (api.rst 4.56) of a VM: in kHz, what new vCPUs start with.

        Needs KVM_CAP_VM_TSC_CONTROL.
        """
        self.need("KVM_CAP_VM_TSC_CONTROL")
        return call(self, "KVM_GET_TSC_KHZ")

    def get_stats_fd(self) -> Stats:
        """KVM_GET_STATS_FD (api.rst 4.133): this VM's statistics, by name.

        Returns: an open :class:`pykvm.kvm.stats.Stats`, the caller's to close. Needs
        KVM_CAP_BINARY_STATS_FD.
        """
        self.need("KVM_CAP_BINARY_STATS_FD")
        fd = call(self, "KVM_GET_STATS_FD")
        from .stats import Stats

        return Stats(fd)

    def _need_attrs(self) -> None:
        self.need("KVM_CAP_VM_ATTRIBUTES")
