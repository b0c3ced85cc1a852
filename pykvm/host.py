"""What never changes about a KVM, asked once; and the RAM that a machine gets by default."""

from __future__ import annotations

import os

from pykvm.kvm import Kvm
from pykvm.memory import GuestMemory, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Host:
    """What never changes about a KVM, asked once."""

    __slots__ = ("cpuid", "kvm", "power_on", "sync_regs")

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        # KVM_GET_REGS and KVM_GET_SREGS of a lone vCPU just made; filled as they are asked.
        self.power_on: dict[str, bytes] = {}
        entries = kvm.get_supported_cpuid()
        # The entries, as KVM_SET_CPUID2 takes them for the first vCPU, and one fact out of them.
        self.cpuid = entries, cpuid_of_one(entries), has_gigapages(entries)
        self.sync_regs = bool(kvm.check_extension("KVM_CAP_SYNC_REGS"))


_hosts: dict[str, tuple[tuple[int, ...], Host]] = {}
"""By path of the device: which device it was, and its facts."""


def open_kvm(path: str) -> tuple[Kvm, Host]:
    """Open a KVM device, whose facts are asked the first time only.

    Raises:
        CapabilityError: no usable KVM, with the remedy.
    """
    known = _hosts.get(path)
    kvm = Kvm(path, like=None if known is None else known[1].kvm)
    try:
        status = os.fstat(kvm.fd)  # KVM's module loaded anew, maybe with options, is a new inode
        which = status.st_dev, status.st_ino, status.st_ctime_ns
        if known is not None:
            if known[0] == which:
                return kvm, known[1]
            kvm.close()
            kvm = Kvm(path)
        host = Host(kvm)
        _hosts[path] = which, host
    except BaseException:
        kvm.close()
        raise
    return kvm, host


def cpuid_of_one(entries: list[Any]) -> Any:
    """The ``struct kvm_cpuid2 *`` of a machine with one vCPU and no interrupt controller."""
    from pykvm.cpu_model import prepare

    return prepare(entries, 0, 1, irqchip=False, features={})


def ram(size: int | str) -> GuestMemory:
    """RAM from address 0, around the hole that a PC has below 4 GiB."""
    length = parse_size(size)
    if length <= 3 << 30:
        return GuestMemory(length)
    from pykvm.boot.layout import ram_ranges

    memory = GuestMemory()
    for gpa, size in ram_ranges(length):
        memory.add(gpa, size)
    return memory


def has_gigapages(entries: list[Any]) -> bool:
    """CPUID 0x80000001 EDX bit 26, pdpe1gb: pages of 1 GiB."""
    return any(e.function == 0x80000001 and e.edx >> 26 & 1 for e in entries)
