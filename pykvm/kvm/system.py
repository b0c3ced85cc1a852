"""The KVM subsystem: ``/dev/kvm`` and the ioctls of its file descriptor."""

from __future__ import annotations

import errno
import os

from pykvm._abi import ffi, lib
from pykvm.errors import CapabilityError, KvmError

from .attrs import AttrReader
from .flex import read_cpuid, read_indices, read_msrs
from .handle import CapHandle
from .ioctl import call, call_int
from .vm import Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any


class Kvm(AttrReader, CapHandle):
    """An open ``/dev/kvm``: what this KVM can do, and the maker of virtual machines.

    A VM lives on when the ``Kvm`` that made it is closed.
    """

    __slots__ = ("path", "vcpu_mmap_size", "vm_caps")

    kind = "kvm"

    def __init__(self, path: str = "/dev/kvm", like: Kvm | None = None) -> None:
        """Open KVM and check that it speaks the one stable version of its API.

        Args:
            path: the device file.
            like: a Kvm of the same device, closed or not: what it was told is not asked again.

        Errors: :class:`CapabilityError` with the remedy when there is no usable KVM behind
        ``path``.
        """
        #: The device file.
        self.path = path
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            self._fd = -1
            from .hints import no_kvm

            raise CapabilityError(no_kvm(path, error.errno or 0)) from error
        super().__init__(fd, {} if like is None else like._caps)
        #: What VMs of each type asked KVM_CHECK_EXTENSION.
        self.vm_caps: dict[int, dict[str, int]] = {} if like is None else like.vm_caps
        #: Size in bytes of the pages shared with each vCPU.
        self.vcpu_mmap_size: int = 0 if like is None else like.vcpu_mmap_size
        if like is None:
            self._greet()

    def _greet(self) -> None:
        try:
            version = self.get_api_version()
            if version != lib.KVM_API_VERSION:
                raise CapabilityError(
                    f"{self.path} speaks version {version} of the KVM API; "
                    f"only version {lib.KVM_API_VERSION} is stable and known"
                )
            self.vcpu_mmap_size = self.get_vcpu_mmap_size()
        except KvmError as error:
            self.close()
            if error.errno != errno.ENOTTY:
                raise
            raise CapabilityError(
                f"{self.path} is not a KVM device: it knows no KVM ioctl"
            ) from error
        except BaseException:
            self.close()
            raise

    def get_api_version(self) -> int:
        """KVM_GET_API_VERSION (api.rst 4.1): 12 on every KVM since Linux 2.6.22."""
        return call(self, "KVM_GET_API_VERSION")

    def create_vm(self, type: int = 0) -> Vm:
        """KVM_CREATE_VM (api.rst 4.2): a new VM without memory and without vCPUs.

        Args:
            type: ``KVM_X86_*_VM``; 0 is an ordinary VM. The types this KVM has are the bits of
                ``check_extension("KVM_CAP_VM_TYPES")``.

        Errors: EINVAL for a type this KVM does not have; ENOMEM; EBUSY when the processor's
        virtualization is in the hands of another hypervisor.
        """
        return Vm(self, call_int(self, "KVM_CREATE_VM", type), type)

    def get_vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE (api.rst 4.5): bytes to map of a vCPU's file descriptor."""
        return call(self, "KVM_GET_VCPU_MMAP_SIZE")

    def get_supported_cpuid(self) -> list[Any]:
        """KVM_GET_SUPPORTED_CPUID (api.rst 4.46): the CPUID leaves KVM and this host can offer.

        Returns: a list of ``struct kvm_cpuid_entry2``, to be edited and given to
        :meth:`Vcpu.set_cpuid2`. Needs KVM_CAP_EXT_CPUID.
        """
        self.need("KVM_CAP_EXT_CPUID")
        return read_cpuid(self, "KVM_GET_SUPPORTED_CPUID")

    def get_emulated_cpuid(self) -> list[Any]:
        """KVM_GET_EMULATED_CPUID (api.rst 4.88): features KVM emulates in software, slowly.

        Returns: a list of ``struct kvm_cpuid_entry2``. Needs KVM_CAP_EXT_EMUL_CPUID.
        """
        self.need("KVM_CAP_EXT_EMUL_CPUID")
        return read_cpuid(self, "KVM_GET_EMULATED_CPUID")

    def get_supported_hv_cpuid(self) -> list[Any]:
        """KVM_GET_SUPPORTED_HV_CPUID (api.rst 4.118): the Hyper-V leaves KVM can offer.

        Returns: a list of ``struct kvm_cpuid_entry2`` (0x40000000 and on). Needs
        KVM_CAP_SYS_HYPERV_CPUID; without it ask a vCPU.
        """
        self.need("KVM_CAP_SYS_HYPERV_CPUID")
        return read_cpuid(self, "KVM_GET_SUPPORTED_HV_CPUID")

    def get_msr_index_list(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST (api.rst 4.3): the MSRs a guest may have saved and restored.

        The MSRs of the machine-check banks are not in it: their number is a vCPU's own.
        """
        return read_indices(self, "KVM_GET_MSR_INDEX_LIST")

    def get_msr_feature_index_list(self) -> list[int]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST (api.rst 4.3): the MSRs :meth:`get_msrs` can read.

        Needs KVM_CAP_GET_MSR_FEATURES.
        """
        self.need("KVM_CAP_GET_MSR_FEATURES")
        return read_indices(self, "KVM_GET_MSR_FEATURE_INDEX_LIST")

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS (api.rst 4.18) of the system: feature MSRs as a guest could have them.

        Args:
            indices: from :meth:`get_msr_feature_index_list`.

        Returns: value by index, in the order asked. Needs KVM_CAP_GET_MSR_FEATURES.

        Errors: :class:`MsrError` naming the first MSR that KVM does not know.
        """
        self.need("KVM_CAP_GET_MSR_FEATURES")
        return read_msrs(self, indices)

    def x86_get_mce_cap_supported(self) -> int:
        """KVM_X86_GET_MCE_CAP_SUPPORTED (api.rst 4.104): machine-check features and banks.

        Returns: a value in the form of MSR IA32_MCG_CAP (bits 7:0 the number of banks), the most
        that :meth:`Vcpu.x86_setup_mce` takes. Needs KVM_CAP_MCE.
        """
        self.need("KVM_CAP_MCE")
        mcg_cap = ffi.new("uint64_t *")
        call(self, "KVM_X86_GET_MCE_CAP_SUPPORTED", mcg_cap)
        return int(mcg_cap[0])

    def _caps_of(self, type: int) -> dict[str, int]:
        """The answers to KVM_CHECK_EXTENSION that all VMs of one type share."""
        return self.vm_caps.setdefault(type, {})

    def _need_attrs(self) -> None:
        self.need("KVM_CAP_SYS_ATTRIBUTES")
