"""vCPU ioctls that say what kind of processor it is: CPUID, MSRs, TSC, machine checks."""

from __future__ import annotations

from pykvm._abi import ffi

from .flex import new_cpuid2, pointer, read_cpuid, read_msrs, read_reg_list, write_msrs
from .ioctl import call, call_int
from .vcpu_state import StateMixin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any


class ModelMixin(StateMixin):
    """The make of a :class:`Vcpu`."""

    __slots__ = ()

    def get_cpuid2(self) -> list[Any]:
        """KVM_GET_CPUID2: the leaves the guest sees, a list of ``struct kvm_cpuid_entry2``.

        Needs KVM_CAP_EXT_CPUID. (In the header; api.rst is silent.)
        """
        self.need("KVM_CAP_EXT_CPUID")
        return read_cpuid(self, "KVM_GET_CPUID2")

    def set_cpuid2(self, entries: Any) -> None:
        """KVM_SET_CPUID2 (in api.rst with 4.20): what the guest's CPUID answers.

        Before the first KVM_RUN. A vCPU without it has no leaf at all, so no long mode either.

        Args:
            entries: ``struct kvm_cpuid_entry2`` objects, as :meth:`Kvm.get_supported_cpuid`
                returns them; or a ``struct kvm_cpuid2 *`` from :func:`pykvm.kvm.new_cpuid2`, which
                saves the copying where many vCPUs get the same.

        Needs KVM_CAP_EXT_CPUID.

        Errors: E2BIG for more entries than KVM takes (256); EINVAL for an address width or
        XSAVE feature this host cannot give, or for a change after the first run.
        """
        self.need("KVM_CAP_EXT_CPUID")
        if not isinstance(entries, ffi.CData):
            entries = new_cpuid2(entries)
        call(self, "KVM_SET_CPUID2", pointer(entries, "struct kvm_cpuid2 *"))

    def get_supported_hv_cpuid(self) -> list[Any]:
        """KVM_GET_SUPPORTED_HV_CPUID (api.rst 4.118) of a vCPU: Hyper-V leaves it can have.

        Returns: a list of ``struct kvm_cpuid_entry2``. Needs KVM_CAP_HYPERV_CPUID.
        """
        self.need("KVM_CAP_HYPERV_CPUID")
        return read_cpuid(self, "KVM_GET_SUPPORTED_HV_CPUID")

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS (api.rst 4.18): read MSRs; value by index, in the order asked.

        Errors: :class:`MsrError` naming the first MSR that cannot be read.
        """
        return read_msrs(self, indices)

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """KVM_SET_MSRS (api.rst 4.19): write MSRs, in the mapping's order.

        Errors: :class:`MsrError` naming the first MSR that refused its value; those before it
        are written.
        """
        write_msrs(self, values)

    def get_one_reg(self, id: int) -> int:
        """KVM_GET_ONE_REG (api.rst 4.69): read one register by its 64-bit id.

        Args:
            id: ``KVM_REG_X86 | size | type | number``; x86 has MSRs and the shadow stack pointer.

        Needs KVM_CAP_ONE_REG (x86: Linux 6.18). Errors: EINVAL for a register there is not.
        """
        self.need("KVM_CAP_ONE_REG")
        value = ffi.new("uint64_t *")
        call(self, "KVM_GET_ONE_REG", _one_reg(id, value))
        return int(value[0])

    def set_one_reg(self, id: int, value: int) -> None:
        """KVM_SET_ONE_REG (api.rst 4.68): write one register by its 64-bit id.

        Args:
            id: as in :meth:`get_one_reg`.
            value: 64 bits.

        Needs KVM_CAP_ONE_REG. Errors: EINVAL for a register or a value there is not.
        """
        self.need("KVM_CAP_ONE_REG")
        buffer = ffi.new("uint64_t *", value)
        call(self, "KVM_SET_ONE_REG", _one_reg(id, buffer))

    def get_reg_list(self) -> list[int]:
        """KVM_GET_REG_LIST (api.rst 4.84): the ids :meth:`get_one_reg` takes, MSRs left out.

        Needs KVM_CAP_ONE_REG (x86: Linux 6.18).
        """
        self.need("KVM_CAP_ONE_REG")
        return read_reg_list(self)

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ (api.rst 4.56): the guest's TSC frequency in kHz.

        Needs KVM_CAP_GET_TSC_KHZ. Errors: EIO if the host's TSC is unstable.
        """
        self.need("KVM_CAP_GET_TSC_KHZ")
        return call(self, "KVM_GET_TSC_KHZ")

    def set_tsc_khz(self, tsc_khz: int) -> None:
        """KVM_SET_TSC_KHZ (api.rst 4.55): the guest's TSC frequency.

        Args:
            tsc_khz: in kHz; 0 is the host's.

        Needs KVM_CAP_TSC_CONTROL, or the host's own frequency. Errors: EINVAL for a frequency
        the host cannot scale to.
        """
        self.need("KVM_CAP_GET_TSC_KHZ")
        call_int(self, "KVM_SET_TSC_KHZ", tsc_khz)

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL (api.rst 4.70): tell the guest that it was paused.

        Its soft-lockup watchdog then forgives the gap. Needs KVM_CAP_KVMCLOCK_CTRL.

        Errors: EINVAL if the guest has not set its kvmclock up.
        """
        self.need("KVM_CAP_KVMCLOCK_CTRL")
        call(self, "KVM_KVMCLOCK_CTRL")

    def x86_setup_mce(self, mcg_cap: int) -> None:
        """KVM_X86_SETUP_MCE (api.rst 4.105): give the vCPU machine-check banks.

        Args:
            mcg_cap: as MSR IA32_MCG_CAP: bits 7:0 the number of banks, at most what KVM_CAP_MCE
                answers; the others within :meth:`Kvm.x86_get_mce_cap_supported`.

        Needs KVM_CAP_MCE. Errors: EINVAL for no or too many banks, or other bits.
        """
        self.need("KVM_CAP_MCE")
        call(self, "KVM_X86_SETUP_MCE", ffi.new("uint64_t *", mcg_cap))

    def x86_set_mce(
        self, bank: int, status: int, mcg_status: int = 0, addr: int = 0, misc: int = 0
    ) -> None:
        """KVM_X86_SET_MCE (api.rst 4.106): report a machine check to the guest.

        An uncorrected error is delivered as #MC (and ends in a shutdown if the guest cannot take
        it); a corrected one is stored in its bank.

        Args:
            bank: number of the bank, below the number given to :meth:`x86_setup_mce`.
            status: IA32_MCi_STATUS; bit 63 (VAL) must be set, bit 61 (UC) is uncorrected.
            mcg_status: IA32_MCG_STATUS.
            addr: IA32_MCi_ADDR.
            misc: IA32_MCi_MISC.

        Needs KVM_CAP_MCE. Errors: EINVAL for another bank, or without VAL.
        """
        self.need("KVM_CAP_MCE")
        mce = ffi.new("struct kvm_x86_mce *")
        mce.status = status
        mce.addr = addr
        mce.misc = misc
        mce.mcg_status = mcg_status
        mce.bank = bank
        call(self, "KVM_X86_SET_MCE", mce)


def _one_reg(id: int, buffer: Any) -> Any:
    return ffi.new("struct kvm_one_reg *", {"id": id, "addr": int(ffi.cast("uintptr_t", buffer))})
