"""Structures of variable size, and the arguments that build them: CPUID leaves and MSRs.

The kernel's lists come in a structure with a count in front. Asking for one is a guess at the
count, answered by E2BIG when it was too small (some ioctls then store the count they want).
"""

from __future__ import annotations

import errno

from pykvm._abi import ffi, lib
from pykvm.errors import KvmError

from .ioctl import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from .handle import Handle

CPUID_ENTRIES = 128  # of today's kernels, 40 to 80 are used
CPUID_ENTRY_SIZE: int = ffi.sizeof("struct kvm_cpuid_entry2")
_UNWRITTEN = b"\xff" * 28 + bytes(12)  # no CPUID leaf; its padding must be zero
MAX_LIST = 1 << 16  # no list of KVM is longer; a kernel that wants more is not answering sensibly
MSRS_PER_CALL = 255  # MAX_IO_MSRS of arch/x86/kvm/x86.c is 256, and KVM takes fewer than that


def new_cpuid2(entries: Iterable[Any]) -> Any:
    """A ``struct kvm_cpuid2 *`` holding copies of ``struct kvm_cpuid_entry2`` entries.

    Build it once and give it to :meth:`Vcpu.set_cpuid2` of many vCPUs.
    """
    items = list(entries)
    cpuid = ffi.new("struct kvm_cpuid2 *", {"nent": len(items), "entries": len(items)})
    for index, entry in enumerate(items):
        cpuid.entries[index] = pointer(entry, "struct kvm_cpuid_entry2 *")[0]
    return cpuid


def to_bytes(entry: Any) -> bytes:
    """A ``struct kvm_cpuid_entry2`` as its bytes."""
    return bytes(ffi.buffer(pointer(entry, "struct kvm_cpuid_entry2 *")))


def from_bytes(data: bytes) -> Any:
    """Back from :func:`to_bytes`. Raises ValueError for another length."""
    entry = ffi.new("struct kvm_cpuid_entry2 *")
    if len(data) != ffi.sizeof(entry[0]):
        raise ValueError(f"a CPUID leaf has {ffi.sizeof(entry[0])} bytes, not {len(data)}")
    ffi.memmove(entry, data, len(data))
    return entry[0]


def read_cpuid(handle: Handle, name: str) -> list[Any]:
    """The entries that a KVM_GET_*CPUID* ioctl returns, each an object of its own."""
    count = CPUID_ENTRIES
    while True:
        cpuid = ffi.new("struct kvm_cpuid2 *", {"nent": count, "entries": count})
        # KVM_GET_CPUID2 of older kernels (6.1) succeeds without saying how many entries it wrote:
        # those that it did not write keep this mark.
        room = ffi.buffer(ffi.cast("char *", cpuid.entries), count * len(_UNWRITTEN))
        room[:] = _UNWRITTEN * count
        try:
            call(handle, name, cpuid)
        except KvmError as error:
            if error.errno != errno.E2BIG or count >= MAX_LIST:
                raise
            count = min(count * 2, MAX_LIST)
            continue
        written, size = cpuid.nent, len(_UNWRITTEN)
        while written and room[(written - 1) * size : written * size] == _UNWRITTEN:
            written -= 1
        entries = cpuid.entries
        return [ffi.new("struct kvm_cpuid_entry2 *", entries[i])[0] for i in range(written)]


def read_indices(handle: Handle, name: str) -> list[int]:
    """The MSR indices that a KVM_GET_MSR_*INDEX_LIST ioctl returns."""
    return _read_list(handle, name, "struct kvm_msr_list *", "nmsrs", "indices")


def read_reg_list(handle: Handle) -> list[int]:
    """The register ids that KVM_GET_REG_LIST returns."""
    return _read_list(handle, "KVM_GET_REG_LIST", "struct kvm_reg_list *", "n", "reg")


def _read_list(handle: Handle, ioctl: str, type: str, count: str, items: str) -> list[int]:
    """A list of numbers: KVM says with E2BIG how many there are."""
    room = 0
    while True:
        listing = ffi.new(type, {count: room, items: room})
        try:
            call(handle, ioctl, listing)
        except KvmError as error:
            wanted = getattr(listing, count)
            if error.errno != errno.E2BIG or not room < wanted <= MAX_LIST:
                raise
            room = wanted
            continue
        return [int(getattr(listing, items)[i]) for i in range(getattr(listing, count))]


class MsrError(KvmError):
    """KVM stopped at one MSR of a list.

    The ioctl itself returned a number, not an error: how many MSRs it had done. So ``errno`` is
    EINVAL by convention.

    Attributes:
        index: the MSR that was refused.
        done: how many before it were read or written.
    """

    def __init__(self, ioctl: str, index: int, done: int, value: int | None = None) -> None:
        if value is None:
            text = f"MSR {index:#x} cannot be read: not known to this KVM, or not in this CPUID"
        else:
            text = (
                f"MSR {index:#x} does not take {value:#x}: a reserved bit, read-only, or not "
                "known to this KVM or in this vCPU's CPUID"
            )
        super().__init__(ioctl, errno.EINVAL, f"{text} (after {done} others)")
        self.index = index
        self.done = done
        self.value = value

    def __reduce__(self) -> Any:
        return MsrError, (self.ioctl, self.index, self.done, self.value)


def read_msrs(handle: Handle, indices: Iterable[int]) -> dict[int, int]:
    """KVM_GET_MSRS for any number of MSRs; see :class:`MsrError`."""
    wanted = list(indices)
    values: dict[int, int] = {}
    for start in range(0, len(wanted), MSRS_PER_CALL):
        chunk = wanted[start : start + MSRS_PER_CALL]
        msrs = ffi.new("struct kvm_msrs *", {"nmsrs": len(chunk), "entries": len(chunk)})
        entries = msrs.entries
        for i, index in enumerate(chunk):
            entries[i].index = index
        done = call(handle, "KVM_GET_MSRS", msrs)
        if done < len(chunk):
            raise MsrError("KVM_GET_MSRS", chunk[done], start + done)
        for i, index in enumerate(chunk):
            values[index] = entries[i].data
    return values


def write_msrs(handle: Handle, values: Mapping[int, int]) -> None:
    """KVM_SET_MSRS for any number of MSRs, in the order given; see :class:`MsrError`."""
    items = list(values.items())
    for start in range(0, len(items), MSRS_PER_CALL):
        chunk = items[start : start + MSRS_PER_CALL]
        msrs = ffi.new("struct kvm_msrs *", {"nmsrs": len(chunk), "entries": len(chunk)})
        entries = msrs.entries
        for i, (index, value) in enumerate(chunk):
            entry = entries[i]
            entry.index = index
            entry.data = value
        done = call(handle, "KVM_SET_MSRS", msrs)
        if done < len(chunk):
            index, value = chunk[done]
            raise MsrError("KVM_SET_MSRS", index, start + done, value)


def get(handle: Handle, name: str, type: str) -> Any:
    """Issue a KVM_GET_* ioctl that fills one structure; return the structure."""
    struct = ffi.new(type)
    call(handle, name, struct)
    return struct


def pointer(struct: Any, type: str) -> Any:
    """The pointer to a cffi structure, given as a pointer or as the structure itself.

    Errors: :class:`TypeError` for a structure of another type, which KVM would read beyond its
    end.
    """
    wanted = ffi.typeof(type)
    given = ffi.typeof(struct) if isinstance(struct, ffi.CData) else struct.__class__
    if given is wanted:
        return struct
    if given is wanted.item:
        return ffi.addressof(struct)
    name = given.cname if isinstance(given, ffi.CType) else given.__name__
    raise TypeError(f"this takes a {type[:-2]}, not a {name}")


def new_enable_cap(cap: int | str, args: tuple[int, ...], flags: int) -> Any:
    """The argument of KVM_ENABLE_CAP."""
    struct = ffi.new("struct kvm_enable_cap *", {"flags": flags, "args": args})
    struct.cap = getattr(lib, cap) if isinstance(cap, str) else cap
    return struct
