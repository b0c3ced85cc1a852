"""The way back: which pages changed, and the plan by which C puts everything back."""

from __future__ import annotations

import os

from pykvm._abi import ffi, lib
from pykvm.errors import KvmError, SnapshotError
from pykvm.kvm.hints import hint
from pykvm.snapshot import vcpu as vcpus
from pykvm.snapshot import vm as vms
from pykvm.snapshot.image import pagemap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pykvm.kvm import Vcpu, Vm
    from pykvm.memory import GuestMemory
    from pykvm.snapshot.image import Image
    from pykvm.snapshot.vcpu import VcpuState

WHOLE: int = lib.PYKVM_RESET_WHOLE
LOG: int = lib.PYKVM_RESET_LOG
MANUAL: int = lib.PYKVM_RESET_MANUAL
MODES = {"whole": WHOLE, "log": LOG, "manual": MANUAL}

PATIENCE = 32
"""Clean pages that are worth copying for one page that would fault if the log were cleared: 0.2 to
0.8 µs each, as caches are warm or cold, against 8 (an emulated write) to 50 µs."""

SYNC_ALL: int = lib.KVM_SYNC_X86_REGS | lib.KVM_SYNC_X86_SREGS | lib.KVM_SYNC_X86_EVENTS


class Tracking:
    """What of a machine's memory changed since it was put back last.

    Attributes:
        mode: WHOLE, LOG or MANUAL, see ``enum pykvm_reset_mode``.
        base: the image that memory is equal to, but for what the logs say; None at first.
    """

    def __init__(self, vm: Vm, memory: GuestMemory, mode: str | None = None) -> None:
        self._vm = vm
        self._memory = memory
        self.writes = memory.track()
        self.mode = MODES[mode] if mode else self._best()
        if self.mode == MANUAL:
            vm.enable_cap(
                "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
            )
        self.base: Image | None = None
        self._dirty: dict[int, Any] = {}
        if self.mode != WHOLE:
            for region in memory.regions:
                self._log(region)

    def _best(self) -> int:
        can = self._vm.check_extension("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
        return MANUAL if can & lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE else LOG

    def _log(self, region: Any) -> None:
        if region.readonly or region.log_dirty:
            return
        region.log_dirty = True
        self._vm.set_user_memory_region(
            region.slot,
            region.guest_phys_addr,
            region.memory_size,
            region.userspace_addr,
            region.flags,
        )

    def check(self, image: Image) -> None:
        """See :meth:`Image.check`; regions come, and never go."""
        if image.closed or self._memory.closed or len(self._memory.regions) != len(image.parts):
            image.check(self._memory)

    def look_for_views(self) -> None:
        """Regions that gave a view of themselves do not say so to anybody."""
        for region in self._memory.regions:
            if region.exposed:
                self.writes.expose(region, 0, region.memory_size)

    def look_at_all(self, slots: Any, image: Image) -> list[Any]:
        """Have the next reset look at every page, but for those that nobody ever touched.

        Returns:
            What C looks at meanwhile, to be kept until then.
        """
        keep = []
        for slot, part, region in zip(slots, image.parts, self._memory.regions, strict=True):
            slot.whole = 1
            # An untouched page is a zero, or what the image has that the region is a copy of.
            if region.source is None or region.source is part:
                touched = pagemap(region)
                if touched is not None:
                    keep.append(ffi.from_buffer("uint64_t[]", touched))
                    slot.pagemap = keep[-1]
        return keep

    def slots(self, image: Image) -> Any:
        """``struct pykvm_reset_slot[]`` for an image of the same regions."""
        image.check(self._memory)
        made = ffi.new("struct pykvm_reset_slot[]", len(image.parts))
        for c, part, region in zip(made, image.parts, self._memory.regions, strict=True):
            if self.mode != WHOLE:
                self._log(region)  # it may be new
            pages = self.writes.of(region)
            dirty = self._dirty.get(region.slot)
            if dirty is None:
                dirty = self._dirty[region.slot] = ffi.new("uint64_t[]", part.words)
            c.memory = ffi.cast("uint8_t *", region.userspace_addr)
            c.image = ffi.cast("uint8_t *", image.address(part))
            c.held, c.dirty = part.held, dirty
            c.touched, c.exposed = pages.touched, pages.exposed
            c.pages, c.slot = part.pages, region.slot
            c.logged = self.mode != WHOLE and not region.readonly
        self.look_for_views()
        return made


_CLOCK_MSRS = (0x11, 0x12, 0x4B564D00, 0x4B564D01, 0x40000000)
"""MSR_KVM_WALL_CLOCK, MSR_KVM_SYSTEM_TIME, the newer two, and Hyper-V's GUEST_OS_ID."""


def _sees_clock(state: VcpuState) -> bool:
    """Whether a guest has asked for KVM's clock: without, nobody can tell what it shows."""
    return any(state.msrs.get(index) for index in _CLOCK_MSRS)


_OTHERS = {
    lib.PYKVM_RESET_FAILED_LOG: "KVM_GET_DIRTY_LOG",
    lib.PYKVM_RESET_FAILED_NESTED: "KVM_SET_NESTED_STATE",
}


class Plan:
    """How one machine is put back to one snapshot.

    Args:
        vm, cpus: whose state it is: of each vCPU KVM's object and its ``struct pykvm_vcpu``.
        tracking: of its memory; None: it is as it should be already.
        states: of each vCPU.
        vm_state: of the VM.
        image: of its memory.
        irqchip: whether the local APICs are in the kernel.

    Attributes:
        c: the ``struct pykvm_reset``.
        timeless: how many of its calls, the first, have nothing to do with the time; all of them
            where timers depend on it.
        nested: whether a vCPU has SVM or VMX on, and so comes back by calls alone.
    """

    def __init__(
        self,
        vm: Vm,
        cpus: Sequence[tuple[Vcpu, Any]],
        tracking: Tracking | None,
        states: Sequence[VcpuState],
        vm_state: dict[str, bytes],
        image: Image,
        irqchip: bool,
    ) -> None:
        self._vm = vm
        self._cpus = cpus
        self._tracking = tracking
        self._image = image
        self._keep: list[Any] = []
        self._pagemaps: list[Any] = []
        self.nested = False
        self._calls: list[tuple[Any, str, Any, int]] = []
        self._tsc: dict[int, tuple[int, int]] = {}
        self._msrs: dict[int, tuple[Vcpu, VcpuState]] = {}
        if len(states) != len(cpus):
            raise SnapshotError(
                f"the snapshot has {len(states)} vCPUs, the machine has {len(cpus)}"
            )
        vcpus_c = ffi.new("struct pykvm_reset_vcpu[]", len(cpus))
        for c, (vcpu, loop), state in zip(vcpus_c, cpus, states, strict=True):
            self._add_vcpu(c, vcpu, loop, state, irqchip)
        if not irqchip:  # else the local APIC's timer wants it before the MSRs
            self.timeless = len(self._calls)
            for (vcpu, _), state in zip(cpus, states, strict=True):
                self._add_tsc(vcpu, state)
        # After the local APICs, which an I/O APIC may interrupt; the clock is last of all.
        for name in vms.STRUCTS:
            if name in vm_state and (name != "clock" or any(map(_sees_clock, states))):
                self._call(vm, vms.STRUCTS[name][1], vms.struct(name, vm_state[name]))
        if irqchip:
            self.timeless = len(self._calls)
        calls = ffi.new("struct pykvm_reset_call[]", max(len(self._calls), 1))
        for at, (handle, name, arg, expected) in enumerate(self._calls):
            each = calls[at]
            each.request, each.arg, each.fd = getattr(lib, name), arg, handle.fd
            each.expected = expected
            if at in self._tsc:
                each.is_tsc, (each.offset, each.then) = 1, self._tsc[at]
        self.c = c = ffi.new("struct pykvm_reset *")
        c.mode = WHOLE
        if tracking is not None:
            self._slots = tracking.slots(image)
            c.slots, c.slot_count, c.mode = self._slots, len(image.parts), tracking.mode
        c.calls, c.call_count = calls, len(self._calls)
        c.vcpus, c.vcpu_count = vcpus_c, len(cpus)
        c.vm_fd, c.patience = vm.fd, PATIENCE
        self._keep += [calls, vcpus_c]

    def _call(self, handle: Any, name: str, arg: Any, expected: int = 0) -> None:
        self._keep.append(arg)
        self._calls.append((handle, name, ffi.cast("void *", arg), expected))

    def _add_vcpu(self, c: Any, vcpu: Vcpu, loop: Any, state: VcpuState, irqchip: bool) -> None:
        sync = vcpu.vm.check_extension("KVM_CAP_SYNC_REGS") if loop.sync_regs else 0
        saved = ffi.new("struct kvm_sync_regs *")
        for name in ("regs", "sregs", "events"):
            if name in state.parts:
                ffi.memmove(ffi.addressof(saved, name), state.parts[name], len(state.parts[name]))
        by_page = SYNC_ALL if sync & SYNC_ALL == SYNC_ALL and "events" in state.parts else 0
        skip = {"regs", "events", "sregs"} if by_page else set()
        nested = bool(saved.sregs.efer >> 12 & 1 or saved.sregs.cr4 >> 13 & 1)  # SVME, VMXE
        if irqchip or nested:  # before the local APIC, before nested state
            skip.discard("sregs")
            by_page &= ~lib.KVM_SYNC_X86_SREGS
        self.nested |= nested
        if not nested:
            skip.add("nested")
            if "nested" in state.parts:  # for a guest that has SVM or VMX on when it goes back
                c.nested = state.shared("nested")
        for name in vcpus.ORDER:
            if name == "tsc":
                if irqchip:
                    self._add_tsc(vcpu, state)
            elif name == "msrs":
                self._msrs[len(self._calls)] = vcpu, state
                self._call(vcpu, "KVM_SET_MSRS", *state.msr_list(vcpu))
            elif name in state.parts and name not in skip:
                room = vcpu.vm.check_extension("KVM_CAP_XSAVE2") if name == "xsave" else 0
                self._call(vcpu, vcpus.STRUCTS[name][1], state.shared(name, room))
        c.vcpu, c.saved = loop, saved
        c.sync, c.seen = by_page, by_page & ~lib.KVM_SYNC_X86_REGS
        self._keep.append(saved)

    def _add_tsc(self, vcpu: Vcpu, state: VcpuState) -> None:
        if state.tsc is None:
            return
        value = ffi.new("uint64_t *")
        attr = ffi.new(
            "struct kvm_device_attr *",
            {
                "group": lib.KVM_VCPU_TSC_CTRL,
                "attr": lib.KVM_VCPU_TSC_OFFSET,
                "addr": int(ffi.cast("uintptr_t", value)),
            },
        )
        self._keep.append(value)
        self._tsc[len(self._calls)] = state.tsc
        self._call(vcpu, "KVM_SET_DEVICE_ATTR", attr)

    # ---- doing it ------------------------------------------------------------------------------

    def check(self) -> None:
        """Look whether all that C was given pointers to is still there.

        Raises:
            ClosedError: the snapshot or the machine's memory was closed.
            SnapshotError: the machine has got more memory since.
        """
        if self._tracking is not None:
            self._tracking.check(self._image)

    def before(self) -> None:
        """What has to be seen to before a reset: another base, new views."""
        tracking = self._tracking
        if tracking is None:
            return
        if tracking.base is not self._image:
            self._pagemaps = tracking.look_at_all(self._slots, self._image)
            tracking.base = self._image
        tracking.look_for_views()

    def run(self) -> bool:
        """Put everything back; False if an access of a vCPU is still open.

        Raises:
            KvmError: KVM refuses a part of the state, by the name of its ioctl.
        """
        self.check()
        self.before()
        error = lib.pykvm_reset(self.c)
        if error and self.mend():
            error = lib.pykvm_reset(self.c)
        if error:
            import errno

            if error == -errno.EAGAIN:
                return False
            self.fail(error)
        return True

    def mend(self) -> bool:
        """After a failure: whether it was MSRs that this vCPU does not take; it is asked which.

        Raises:
            MsrError: it refuses a value that it does not have already.
        """
        failed = self.c.failed
        if failed not in self._msrs or self.c.result < 0:
            return False
        vcpu, state = self._msrs[failed]
        made, count = state.msr_list(vcpu, anew=True)
        self._keep.append(made)
        each = self.c.calls[failed]
        each.arg, each.expected = ffi.cast("void *", made), count
        return True

    def fail(self, error: int) -> None:
        """Raise what the failure of a reset means."""
        if self._tracking is not None:
            self._tracking.base = None
        failed = self.c.failed
        name = _OTHERS.get(failed) or self._calls[failed][1]
        raise KvmError(name, -error, hint(name, -error) or os.strerror(-error))
