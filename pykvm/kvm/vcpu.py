"""A virtual processor: KVM_RUN, its run page, and what can be put to it from outside.

Its state is in :mod:`pykvm.kvm.vcpu_state`, its make (CPUID, MSRs) in :mod:`pykvm.kvm.vcpu_model`.
"""

from __future__ import annotations

from pykvm._abi import ffi, lib
from pykvm.errors import ClosedError, KvmError

from .flex import new_enable_cap
from .ioctl import call
from .vcpu_model import ModelMixin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from .exits import Exit
    from .rings import Coalesced, DirtyRing
    from .stats import Stats
    from .vm import Vm

KERNEL_SIGSET_BYTES = 8  # sizeof(sigset_t) of the kernel's ABI, not of libc's


class Vcpu(ModelMixin):
    """A virtual processor (``Vm.create_vcpu``).

    One thread at a time: KVM serialises the ioctls of a vCPU, so another thread's call waits until
    KVM_RUN returns. ``immediate_exit`` and a signal make it return.
    """

    __slots__ = ("_run", "id", "mmap_size")

    kind = "vcpu"

    def __init__(self, vm: Vm, fd: int, id: int) -> None:
        super().__init__(fd)
        #: The VM it belongs to.
        self.vm = vm
        #: Its id, which is its APIC ID.
        self.id = id
        #: Bytes of the mapping behind :attr:`kvm_run`.
        self.mmap_size = size = vm.kvm.vcpu_mmap_size
        self._run: Any = None
        run = lib.pykvm_run_map(fd, size)
        if not run:
            error = KvmError("mmap", ffi.errno)
            self.close()
            raise error
        # The pointer holds the mapping: it is unmapped when the last such pointer is gone.
        self._run = ffi.gc(run, lambda run: lib.pykvm_run_unmap(run, size))

    @property
    def kvm_run(self) -> Any:
        """The ``struct kvm_run *`` shared with the kernel (api.rst chapter 5).

        A pointer that is kept after ``close`` stays valid, and with it the VM in the kernel.
        """
        run = self._run
        if run is None:
            raise ClosedError(f"this {self.kind} is closed")
        return run

    def close(self) -> None:
        """Unmap the run page (unless somebody holds it) and close the file descriptor."""
        self._run = None
        super().close()

    def run(self) -> Exit:
        """KVM_RUN (api.rst 4.10): run the guest until it needs something.

        One ioctl: an access that the last exit left open is completed with the answer in the run
        page (:meth:`complete_io` and its siblings put it there), then the guest goes on.

        Returns: the exit, its values copied out of the run page (:mod:`pykvm.kvm.exits`). A signal
        or ``immediate_exit`` is an :class:`IntrExit`; a fault on guest memory that KVM explains
        (KVM_EXIT_MEMORY_FAULT beside EFAULT) a :class:`MemoryFaultExit`.

        Errors: EFAULT when guest memory is not there in this process, without an explanation;
        EAGAIN for an application processor that was not started; EINVAL if the run page asks for
        what KVM does not have.
        """
        from .exits import decode, decode_failed

        try:
            call(self, "KVM_RUN")
        except KvmError as error:
            exit = decode_failed(self._run, error.errno or 0)
            if exit is None:
                raise
            return exit
        return decode(self._run)

    @property
    def immediate_exit(self) -> int:
        """Nonzero makes KVM_RUN return at once with EINTR (api.rst chapter 5).

        It completes the access of the last exit first, so registers are whole afterwards. It stays
        set until cleared. Only with KVM_CAP_IMMEDIATE_EXIT does KVM look at it.
        """
        return int(self.kvm_run.immediate_exit)

    @immediate_exit.setter
    def immediate_exit(self, value: int) -> None:
        self.kvm_run.immediate_exit = value

    def complete_io(self, data: bytes | int) -> None:
        """Answer a KVM_EXIT_IO read: ``size * count`` bytes, or for one item its value."""
        io = self.kvm_run.io
        size = io.size * io.count
        if isinstance(data, int):
            data = data.to_bytes(size, "little")
        if len(data) != size:
            raise ValueError(
                f"KVM_EXIT_IO wants {size} bytes ({io.count} × {io.size}), not {len(data)}"
            )
        ffi.memmove(ffi.cast("char *", self._run) + io.data_offset, data, size)

    def complete_mmio(self, data: bytes | int) -> None:
        """Answer a KVM_EXIT_MMIO read: ``len`` bytes (1 to 8), or their little-endian value."""
        mmio = self.kvm_run.mmio
        size = mmio.len
        if isinstance(data, int):
            data = data.to_bytes(size, "little")
        if len(data) != size:
            raise ValueError(f"KVM_EXIT_MMIO wants {size} bytes, not {len(data)}")
        ffi.memmove(mmio.data, data, size)

    def complete_msr(self, data: int = 0, error: int = 0) -> None:
        """Answer KVM_EXIT_X86_RDMSR with ``data``, or either MSR exit with #GP (``error`` 1)."""
        msr = self.kvm_run.msr
        msr.error = error
        msr.data = data

    def complete_hypercall(self, ret: int) -> None:
        """Answer KVM_EXIT_HYPERCALL: what the guest gets in RAX."""
        self.kvm_run.hypercall.ret = ret

    def coalesced(self) -> list[Coalesced]:
        """Take the writes that coalesced zones collected, oldest first (api.rst 4.116).

        The ring belongs to the VM: any of its vCPUs shows the same one, and one thread at a time
        may empty it.
        """
        from .rings import drain_coalesced

        self.vm.need("KVM_CAP_COALESCED_MMIO")
        return drain_coalesced(self.kvm_run)

    def dirty_ring(self, size: int) -> DirtyRing:
        """Map this vCPU's dirty ring (api.rst, KVM_CAP_DIRTY_LOG_RING).

        Args:
            size: in bytes, what the VM enabled KVM_CAP_DIRTY_LOG_RING (or _ACQ_REL) with.
        """
        from .rings import DirtyRing

        return DirtyRing(self.fd, size)

    def translate(self, linear_address: int) -> Any:
        """KVM_TRANSLATE (api.rst 4.15): walk the guest's page tables for one address.

        Returns: ``struct kvm_translation *``: ``physical_address`` if ``valid``. KVM on x86 does
        not compute ``writeable`` and ``usermode``: they are 1 and 0.
        """
        translation = ffi.new("struct kvm_translation *", {"linear_address": linear_address})
        call(self, "KVM_TRANSLATE", translation)
        return translation

    def interrupt(self, irq: int) -> None:
        """KVM_INTERRUPT (api.rst 4.16): inject an external interrupt at the next KVM_RUN.

        For VMs without in-kernel PIC; when ``kvm_run.ready_for_interrupt_injection`` says so
        (``request_interrupt_window`` asks for an exit when it will).

        Args:
            irq: the vector, 0-255: not a line, not a GSI.

        Errors: EEXIST if one is waiting already; EINVAL for another vector; ENXIO if the PIC is
        in the kernel.
        """
        call(self, "KVM_INTERRUPT", ffi.new("struct kvm_interrupt *", {"irq": irq}))

    def nmi(self) -> None:
        """KVM_NMI (api.rst 4.64): queue a non-maskable interrupt. Needs KVM_CAP_USER_NMI."""
        self.need("KVM_CAP_USER_NMI")
        call(self, "KVM_NMI")

    def smi(self) -> None:
        """KVM_SMI (api.rst 4.96): queue a system-management interrupt.

        Needs KVM_CAP_X86_SMM.
        """
        self.need("KVM_CAP_X86_SMM")
        call(self, "KVM_SMI")

    def set_guest_debug(self, control: int, debugreg: Sequence[int] = ()) -> None:
        """KVM_SET_GUEST_DEBUG (api.rst 4.87): breakpoints and single steps, seen from outside.

        Args:
            control: 0 for none, or KVM_GUESTDBG_ENABLE with KVM_GUESTDBG_SINGLESTEP,
                KVM_GUESTDBG_USE_SW_BP (INT3 exits), KVM_GUESTDBG_USE_HW_BP,
                KVM_GUESTDBG_INJECT_DB or _BP, KVM_GUESTDBG_BLOCKIRQ.
            debugreg: DR0 to DR7, with KVM_GUESTDBG_USE_HW_BP; the rest are zero.

        Needs KVM_CAP_SET_GUEST_DEBUG. The debug exits are :class:`DebugExit`.

        Errors: EBUSY if an exception is pending when one is to be injected; EINVAL for a control
        bit KVM does not have.
        """
        self.need("KVM_CAP_SET_GUEST_DEBUG")
        debug = ffi.new("struct kvm_guest_debug *", {"control": control})
        for index, value in enumerate(debugreg):
            debug.arch.debugreg[index] = value
        call(self, "KVM_SET_GUEST_DEBUG", debug)

    def set_signal_mask(self, signals: Iterable[int] | None) -> None:
        """KVM_SET_SIGNAL_MASK (api.rst 4.21): the signals blocked while KVM_RUN runs.

        A signal that the thread blocks and this mask does not makes KVM_RUN return, without being
        delivered.

        Args:
            signals: the numbers to block, 1-64; None gives the thread's own mask back.
        """
        if signals is None:
            call(self, "KVM_SET_SIGNAL_MASK")
            return
        bits = 0
        for signal in signals:
            if not 1 <= signal <= 64:
                raise ValueError(f"KVM_SET_SIGNAL_MASK: there is no signal {signal}")
            bits |= 1 << (signal - 1)
        mask = ffi.new(
            "struct kvm_signal_mask *",
            {
                "len": KERNEL_SIGSET_BYTES,
                "sigset": list(bits.to_bytes(KERNEL_SIGSET_BYTES, "little")),
            },
        )
        call(self, "KVM_SET_SIGNAL_MASK", mask)

    def enable_cap(self, cap: int | str, *args: int, flags: int = 0) -> int:
        """KVM_ENABLE_CAP (api.rst 4.37) of a vCPU: switch a capability on for this vCPU.

        On x86 these are Hyper-V's and KVM_CAP_ENFORCE_PV_FEATURE_CPUID.

        Args:
            cap: a ``KVM_CAP_*`` number, or its name.
            args: up to four 64-bit arguments, as the capability defines them.
            flags: none are defined.

        Needs KVM_CAP_ENABLE_CAP. Errors: EINVAL for a capability that is not a vCPU's.
        """
        self.need("KVM_CAP_ENABLE_CAP")
        return call(self, "KVM_ENABLE_CAP", new_enable_cap(cap, args, flags))

    def tpr_access_reporting(self, enabled: bool, flags: int = 0) -> None:
        """KVM_TPR_ACCESS_REPORTING: exit when the guest touches its task priority register.

        The exits are :class:`TprAccessExit`. Needs KVM_CAP_VAPIC. (In the header; api.rst is
        silent.)

        Errors: EINVAL with flags.
        """
        self.need("KVM_CAP_VAPIC")
        control = ffi.new("struct kvm_tpr_access_ctl *", {"enabled": int(enabled), "flags": flags})
        call(self, "KVM_TPR_ACCESS_REPORTING", control)

    def set_vapic_addr(self, vapic_addr: int) -> None:
        """KVM_SET_VAPIC_ADDR: where guest and KVM share the task priority register.

        Args:
            vapic_addr: guest-physical address of 4 bytes; 0 turns it off.

        Needs KVM_CAP_VAPIC. Errors: EINVAL without an in-kernel irqchip, or outside memory.
        """
        self.need("KVM_CAP_VAPIC")
        call(
            self,
            "KVM_SET_VAPIC_ADDR",
            ffi.new("struct kvm_vapic_addr *", {"vapic_addr": vapic_addr}),
        )

    def pre_fault_memory(self, gpa: int, size: int, flags: int = 0) -> int:
        """KVM_PRE_FAULT_MEMORY (api.rst 4.143): map guest memory before the guest touches it.

        Args:
            gpa: first guest-physical address; a multiple of 4096.
            size: bytes; a multiple of 4096.
            flags: none are defined.

        Returns: how many bytes at the end of the range are left to do: 0 when all was mapped.
        KVM stops early for a signal. Needs KVM_CAP_PRE_FAULT_MEMORY.

        Errors: ENOENT at memory without a slot; EOPNOTSUPP where KVM does not map by nested
        paging; EAGAIN while a slot is being moved.
        """
        self.need("KVM_CAP_PRE_FAULT_MEMORY")
        args = ffi.new("struct kvm_pre_fault_memory *", {"gpa": gpa, "size": size, "flags": flags})
        call(self, "KVM_PRE_FAULT_MEMORY", args)
        return int(args.size)

    def get_stats_fd(self) -> Stats:
        """KVM_GET_STATS_FD (api.rst 4.133): this vCPU's statistics, by name.

        Returns: an open :class:`pykvm.kvm.stats.Stats`, the caller's to close. Needs
        KVM_CAP_BINARY_STATS_FD.
        """
        self.need("KVM_CAP_BINARY_STATS_FD")
        fd = call(self, "KVM_GET_STATS_FD")
        from .stats import Stats

        return Stats(fd)

    def _need_attrs(self) -> None:
        self.need("KVM_CAP_VCPU_ATTRIBUTES")
