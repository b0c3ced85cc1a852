"""The least that a KVM test needs to run some bytes: memory for a Vm, and a vCPU in real mode."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from struct import pack

from pykvm._abi import ffi
from pykvm.kvm import Vcpu, Vm, exits

CODE = 0x1000
STACK = 0x8000


class Ram:
    """Anonymous memory of this process, given to VMs as slots."""

    def __init__(self, size: int = 0x10000) -> None:
        self.map = mmap.mmap(-1, size)
        self.size = size
        self.view = ffi.from_buffer("char[]", self.map)
        self.address = int(ffi.cast("uintptr_t", self.view))

    def __setitem__(self, at: int, data: bytes) -> None:
        self.map[at : at + len(data)] = data

    def read(self, at: int, size: int) -> bytes:
        return self.map[at : at + size]

    def close(self) -> None:
        ffi.release(self.view)
        self.map.close()


@contextmanager
def ram(vm: Vm, size: int = 0x10000, slot: int = 0, at: int = 0, flags: int = 0) -> Iterator[Ram]:
    """Memory of ``size`` bytes as a slot of ``vm``; the slot goes before the memory does."""
    memory = Ram(size)
    vm.set_user_memory_region(slot, at, size, memory.address, flags)
    try:
        yield memory
    finally:
        if not vm.closed:
            vm.set_user_memory_region(slot, at, 0, 0)
        memory.close()


def enter_real_mode(vcpu: Vcpu, rip: int = CODE, **registers: int) -> None:
    """Put a vCPU at ``0000:rip`` with all segments at 0, interrupts off, and a stack."""
    sregs = vcpu.get_sregs()
    for segment in (sregs.cs, sregs.ds, sregs.es, sregs.ss):
        segment.base = segment.selector = 0
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip, regs.rflags, regs.rsp = rip, 2, STACK
    for name, value in registers.items():
        setattr(regs, name, value)
    vcpu.set_regs(regs)


def start(vcpu: Vcpu, memory: Ram, code: str, **registers: int) -> None:
    """Load machine code, in hex, at 0x1000 and put the vCPU there in real mode."""
    memory[CODE] = bytes.fromhex(code)
    enter_real_mode(vcpu, **registers)


def run_to(vcpu: Vcpu, kind: type[exits.Exit], limit: int = 1000) -> exits.Exit:
    """Run until an exit of that kind; signals in between are not counted."""
    seen = []
    for _ in range(limit):
        exit = vcpu.run()
        if isinstance(exit, kind):
            return exit
        if not isinstance(exit, exits.IntrExit):
            seen.append(exit)
    raise AssertionError(f"no {kind.__name__} in {limit} exits, but {seen[:5]}")


def start_ring3(vcpu: Vcpu, memory: Ram, code: str, **registers: int) -> None:
    """Load machine code, in hex, at 0x1000 and put the vCPU there in 64-bit mode, ring 3.

    With I/O privilege, and page tables at 0x10000 that map the lowest 16 MiB one to one. Every
    KVM runs this on the bare processor, also one that emulates ring 0.
    """
    memory[0x10000] = pack("<Q", 0x11007)
    memory[0x11000] = pack("<Q", 0x12007)
    memory[0x12000] = pack("<8Q", *(page << 21 | 0x87 for page in range(8)))
    memory[CODE] = bytes.fromhex(code)
    sregs = vcpu.get_sregs()
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x8001_0031, 0x10000, 0x20, 0x500
    for segment, selector, type, long in (
        (sregs.cs, 0x33, 11, 1),
        (sregs.ss, 0x2B, 3, 0),
        (sregs.ds, 0x2B, 3, 0),
        (sregs.es, 0x2B, 3, 0),
    ):
        segment.base, segment.limit, segment.selector, segment.type = 0, 0xFFFF_FFFF, selector, type
        segment.present = segment.s = segment.g = 1
        segment.dpl, segment.l, segment.db = 3, long, 1 - long
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip, regs.rflags, regs.rsp = CODE, 0x3002, STACK
    for name, value in registers.items():
        setattr(regs, name, value)
    vcpu.set_regs(regs)
