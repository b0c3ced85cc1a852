"""VM ioctls about guest-physical memory: slots, guest_memfd, dirty pages, coalesced writes."""

from __future__ import annotations

import errno
import os

from pykvm._abi import ffi
from pykvm.errors import KvmError

from .handle import CapHandle
from .ioctl import call, call_int

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .handle import BytesLike

PAGE_SIZE = 4096


class MemoryMixin(CapHandle):
    """What :class:`Vm` does with memory."""

    __slots__ = ("_slot_pages",)

    #: Pages of each slot set through this object. KVM writes a bitmap as long as the slot into
    #: memory we hand it, so its length must never be guessed.
    _slot_pages: dict[int, int]

    def set_user_memory_region(
        self,
        slot: int,
        guest_phys_addr: int,
        memory_size: int,
        userspace_addr: int,
        flags: int = 0,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION (api.rst 4.35): make, change or delete a memory slot.

        Args:
            slot: bits 15:0 the slot's number, below KVM_CAP_NR_MEMSLOTS; bits 31:16 the address
                space, below KVM_CAP_MULTI_ADDRESS_SPACE (1 is what the guest sees in SMM).
            guest_phys_addr: first guest-physical address; a multiple of 4096.
            memory_size: bytes, a multiple of 4096; 0 deletes the slot.
            userspace_addr: address in this process of the memory; a multiple of 4096. The memory
                must stay mapped as long as the slot: KVM does not hold it.
            flags: KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY (KVM_CAP_READONLY_MEM).

        A slot may be moved or change its flags, but not its size: delete it first. Bits 20:0 of
        both addresses should be the same, so that huge pages of the host map huge in the guest.

        Errors: EINVAL for a misaligned or resized slot; EEXIST if it overlaps another.
        """
        region = ffi.new("struct kvm_userspace_memory_region *")
        region.slot = slot
        region.flags = flags
        region.guest_phys_addr = guest_phys_addr
        region.memory_size = memory_size
        region.userspace_addr = userspace_addr
        self._set_slot("KVM_SET_USER_MEMORY_REGION", region)

    def set_user_memory_region2(
        self,
        slot: int,
        guest_phys_addr: int,
        memory_size: int,
        userspace_addr: int,
        flags: int = 0,
        guest_memfd: int = 0,
        guest_memfd_offset: int = 0,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2 (api.rst 4.140): the same, with a guest_memfd behind it.

        Args:
            slot: as in :meth:`set_user_memory_region`, and so the next four.
            guest_phys_addr: first guest-physical address.
            memory_size: bytes; 0 deletes the slot.
            userspace_addr: address of the memory that shared pages live in.
            flags: KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_MEM_GUEST_MEMFD.
            guest_memfd: from :meth:`create_guest_memfd`, with flag KVM_MEM_GUEST_MEMFD.
            guest_memfd_offset: bytes into it; a multiple of 4096.

        Needs KVM_CAP_USER_MEMORY2.

        Errors: EINVAL, EEXIST as there; EBADF if guest_memfd is not one.
        """
        self.need("KVM_CAP_USER_MEMORY2")
        region = ffi.new("struct kvm_userspace_memory_region2 *")
        region.slot = slot
        region.flags = flags
        region.guest_phys_addr = guest_phys_addr
        region.memory_size = memory_size
        region.userspace_addr = userspace_addr
        region.guest_memfd = guest_memfd
        region.guest_memfd_offset = guest_memfd_offset
        self._set_slot("KVM_SET_USER_MEMORY_REGION2", region)

    def _set_slot(self, name: str, region: Any) -> None:
        try:
            call(self, name, region)
        except KvmError as error:
            if error.errno == errno.EINVAL:
                from .hints import broken_slot_rule

                error.hint = broken_slot_rule(self, region) or error.hint
            raise
        if region.memory_size:
            self._slot_pages[region.slot] = region.memory_size // PAGE_SIZE
        else:
            self._slot_pages.pop(region.slot, None)

    def create_guest_memfd(self, size: int, flags: int = 0) -> int:
        """KVM_CREATE_GUEST_MEMFD (api.rst 4.142): memory that belongs to this VM alone.

        Args:
            size: bytes, a multiple of 4096.
            flags: ``GUEST_MEMFD_FLAG_*``, the bits of KVM_CAP_GUEST_MEMFD_FLAGS.

        Returns: a file descriptor, the caller's to close (slots keep the memory). Without
        GUEST_MEMFD_FLAG_MMAP it cannot be mapped. Needs KVM_CAP_GUEST_MEMFD.

        Errors: EINVAL for a size or flags KVM does not take.
        """
        self.need("KVM_CAP_GUEST_MEMFD")
        args = ffi.new("struct kvm_create_guest_memfd *", {"size": size, "flags": flags})
        fd = call(self, "KVM_CREATE_GUEST_MEMFD", args)
        os.set_inheritable(fd, False)  # KVM makes all its descriptors close-on-exec but this one
        return fd

    def set_memory_attributes(
        self, address: int, size: int, attributes: int, flags: int = 0
    ) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES (api.rst 4.141): say which pages are private.

        Args:
            address: first guest-physical address; a multiple of 4096.
            size: bytes; a multiple of 4096.
            attributes: KVM_MEMORY_ATTRIBUTE_PRIVATE, or 0 for shared. The ones this VM has are
                the bits of ``check_extension("KVM_CAP_MEMORY_ATTRIBUTES")``.
            flags: none are defined.

        Needs KVM_CAP_MEMORY_ATTRIBUTES.
        """
        self.need("KVM_CAP_MEMORY_ATTRIBUTES")
        args = ffi.new(
            "struct kvm_memory_attributes *",
            {"address": address, "size": size, "attributes": attributes, "flags": flags},
        )
        call(self, "KVM_SET_MEMORY_ATTRIBUTES", args)

    def get_dirty_log(self, slot: int) -> bytearray:
        """KVM_GET_DIRTY_LOG (api.rst 4.8): the pages of a slot written since the last call.

        Args:
            slot: one set through this object with KVM_MEM_LOG_DIRTY_PAGES; bits 31:16 are the
                address space.

        Returns: a bitmap, bit ``n % 8`` of byte ``n // 8`` for page ``n`` of the slot, padded
        with zeros to 8 bytes; :func:`pykvm.kvm.rings.dirty_pages` lists it. The log is cleared by
        the call, unless KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is enabled: then
        :meth:`clear_dirty_log` clears it.

        Errors: ENOENT if there is no such slot, or it does not log; ENXIO if the VM uses dirty
        rings; :class:`ValueError` for a slot not set through this object.
        """
        pages = self._slot_pages.get(slot)
        if pages is None:
            raise ValueError(f"KVM_GET_DIRTY_LOG: slot {slot} was not set through this Vm")
        bitmap = bytearray((pages + 63) // 64 * 8)
        log = ffi.new("struct kvm_dirty_log *", {"slot": slot})
        log.dirty_bitmap = buffer = ffi.from_buffer(bitmap, require_writable=True)
        try:
            call(self, "KVM_GET_DIRTY_LOG", log)
        finally:
            ffi.release(buffer)
        return bitmap

    def clear_dirty_log(
        self, slot: int, dirty_bitmap: BytesLike, first_page: int = 0, num_pages: int | None = None
    ) -> None:
        """KVM_CLEAR_DIRTY_LOG (api.rst 4.117): mark pages clean and log them anew.

        Args:
            slot: as in :meth:`get_dirty_log`.
            dirty_bitmap: bit 0 of its first byte is ``first_page``; pages with a set bit become
                clean.
            first_page: a page of the slot; a multiple of 64.
            num_pages: a multiple of 64, or up to the slot's end. Without it, all that the bitmap
                covers of the slot.

        Needs KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (to be present; it is useful when enabled).

        Errors: ENOENT as in :meth:`get_dirty_log`; EINVAL for a range not as above;
        :class:`ValueError` for a bitmap shorter than ``num_pages``.
        """
        self.need("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
        covered = memoryview(dirty_bitmap).nbytes * 8
        if num_pages is None:
            pages = self._slot_pages.get(slot, first_page + covered)
            num_pages = max(0, min(covered, pages - first_page))
        elif num_pages > covered:
            raise ValueError(
                f"KVM_CLEAR_DIRTY_LOG: {num_pages} pages need more than {covered} bits"
            )
        # KVM reads whole 64-bit words.
        bitmap = ffi.new("char[]", bytes(dirty_bitmap) + bytes(8))
        log = ffi.new(
            "struct kvm_clear_dirty_log *",
            {"slot": slot, "num_pages": num_pages, "first_page": first_page},
        )
        log.dirty_bitmap = bitmap
        call(self, "KVM_CLEAR_DIRTY_LOG", log)

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS (api.rst, KVM_CAP_DIRTY_LOG_RING): log harvested pages anew.

        Returns: how many pages. Needs KVM_CAP_DIRTY_LOG_RING, enabled before the first vCPU.
        """
        if not self._caps.get("KVM_CAP_DIRTY_LOG_RING_ACQ_REL"):
            self.need("KVM_CAP_DIRTY_LOG_RING")
        return call(self, "KVM_RESET_DIRTY_RINGS")

    def set_nr_mmu_pages(self, nr_mmu_pages: int) -> None:
        """KVM_SET_NR_MMU_PAGES: how many pages of page tables KVM may keep for this VM.

        Fewer make KVM drop and rebuild its shadow or nested page tables more often; the least is
        64. Needs KVM_CAP_MMU_SHADOW_CACHE_CONTROL. (In the header; api.rst is silent.)
        """
        self.need("KVM_CAP_MMU_SHADOW_CACHE_CONTROL")
        call_int(self, "KVM_SET_NR_MMU_PAGES", nr_mmu_pages)

    def get_nr_mmu_pages(self) -> int:
        """KVM_GET_NR_MMU_PAGES: the limit of :meth:`set_nr_mmu_pages`, by default by RAM size.

        Needs KVM_CAP_MMU_SHADOW_CACHE_CONTROL. Errors: ENOTTY on kernels that dropped it (6.4).
        """
        self.need("KVM_CAP_MMU_SHADOW_CACHE_CONTROL")
        return call(self, "KVM_GET_NR_MMU_PAGES")

    def register_coalesced_mmio(self, addr: int, size: int, pio: bool = False) -> None:
        """KVM_REGISTER_COALESCED_MMIO (api.rst 4.116): writes here wait in a ring, without exits.

        The next exit for another reason is the time to read them: ``Vcpu.coalesced()``.

        Args:
            addr: first guest-physical address, or first port.
            size: bytes, or ports.
            pio: ports instead of memory (KVM_CAP_COALESCED_PIO).

        Needs KVM_CAP_COALESCED_MMIO.

        Errors: ENOSPC when too many zones are registered on the bus.
        """
        self._coalesced("KVM_REGISTER_COALESCED_MMIO", addr, size, pio)

    def unregister_coalesced_mmio(self, addr: int, size: int, pio: bool = False) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO (api.rst 4.116): let writes in these zones exit again.

        Args: as in :meth:`register_coalesced_mmio`; every zone inside the range is removed.
        """
        self._coalesced("KVM_UNREGISTER_COALESCED_MMIO", addr, size, pio)

    def _coalesced(self, name: str, addr: int, size: int, pio: bool) -> None:
        self.need("KVM_CAP_COALESCED_PIO" if pio else "KVM_CAP_COALESCED_MMIO")
        zone = ffi.new(
            "struct kvm_coalesced_mmio_zone *", {"addr": addr, "size": size, "pio": int(pio)}
        )
        call(self, name, zone)
