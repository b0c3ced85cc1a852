"""VM ioctls that say which MSRs and which performance events a guest may touch."""

from __future__ import annotations

from pykvm._abi import ffi, lib

from .handle import CapHandle
from .ioctl import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from .handle import BytesLike


class MsrRange:
    """One range of an MSR filter.

    Attributes:
        flags: KVM_MSR_FILTER_READ and KVM_MSR_FILTER_WRITE: the accesses it decides.
        base: its first MSR.
        nmsrs: how many MSRs.
        bitmap: bit ``n % 8`` of byte ``n // 8`` for MSR ``base + n``; 1 lets the access through
            to KVM, 0 denies it.
    """

    __slots__ = ("base", "bitmap", "flags", "nmsrs")

    def __init__(self, flags: int, base: int, nmsrs: int, bitmap: BytesLike = b"") -> None:
        """Args: see the attributes; a bitmap shorter than the range is zeros (denied) beyond."""
        self.flags = flags
        self.base = base
        self.nmsrs = nmsrs
        self.bitmap = bytes(bitmap)

    def __repr__(self) -> str:
        return (
            f"MsrRange(flags={self.flags:#x}, base={self.base:#x}, nmsrs={self.nmsrs}, "
            f"bitmap={self.bitmap!r})"
        )


class FilterMixin(CapHandle):
    """What :class:`Vm` forbids its guest."""

    __slots__ = ()

    def x86_set_msr_filter(self, ranges: Iterable[MsrRange] = (), flags: int = 0) -> None:
        """KVM_X86_SET_MSR_FILTER (api.rst 4.97): which MSRs a guest may read and write.

        A denied access is #GP in the guest, or with KVM_CAP_X86_USER_SPACE_MSR enabled for
        KVM_MSR_EXIT_REASON_FILTER an exit.

        Args:
            ranges: up to 16, without two that cover one MSR and one access.
            flags: what happens to MSRs in no range: KVM_MSR_FILTER_DEFAULT_ALLOW or
                KVM_MSR_FILTER_DEFAULT_DENY. Without ranges the filter is off, and DENY invalid.

        The x2APIC's MSRs (0x800-0x8ff) are never filtered. Needs KVM_CAP_X86_MSR_FILTER.

        Errors: EINVAL for a range of no or too many MSRs (1 to 12288), or wrong flags.
        """
        self.need("KVM_CAP_X86_MSR_FILTER")
        items = list(ranges)
        if len(items) > lib.KVM_MSR_FILTER_MAX_RANGES:
            raise ValueError(
                f"KVM_X86_SET_MSR_FILTER: {len(items)} ranges, "
                f"KVM takes {lib.KVM_MSR_FILTER_MAX_RANGES}"
            )
        args = ffi.new("struct kvm_msr_filter *", {"flags": flags})
        bitmaps = []  # must outlive the call
        for target, item in zip(args.ranges, items, strict=False):
            # KVM reads whole longs.
            size = (item.nmsrs + 63) // 64 * 8
            bitmap = ffi.new("unsigned char[]", item.bitmap[:size].ljust(size, b"\0"))
            bitmaps.append(bitmap)
            target.flags = item.flags
            target.base = item.base
            target.nmsrs = item.nmsrs
            target.bitmap = bitmap
        call(self, "KVM_X86_SET_MSR_FILTER", args)

    def set_pmu_event_filter(
        self,
        action: int,
        events: Iterable[int] = (),
        fixed_counter_bitmap: int = 0,
        flags: int = 0,
    ) -> None:
        """KVM_SET_PMU_EVENT_FILTER (api.rst 4.120): which performance events a guest may count.

        Args:
            action: KVM_PMU_EVENT_ALLOW only these, or KVM_PMU_EVENT_DENY these.
            events: event select and unit mask, as in bits 15:0 (AMD also 35:32) of an event
                select MSR; up to 300.
            fixed_counter_bitmap: bit n for fixed counter n, under the same action.
            flags: KVM_PMU_EVENT_FLAG_MASKED_EVENTS gives ``events`` another form
                (KVM_CAP_PMU_EVENT_MASKED_EVENTS).

        Needs KVM_CAP_PMU_EVENT_FILTER.

        Errors: E2BIG for too many events; EINVAL for another action or flag.
        """
        self.need("KVM_CAP_PMU_EVENT_FILTER")
        values = list(events)
        args = ffi.new(
            "struct kvm_pmu_event_filter *",
            {
                "action": action,
                "nevents": len(values),
                "fixed_counter_bitmap": fixed_counter_bitmap,
                "flags": flags,
                "events": values,
            },
        )
        call(self, "KVM_SET_PMU_EVENT_FILTER", args)
