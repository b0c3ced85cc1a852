"""A KVM_RUN loop as one writes it with ctypes alone: libc's ioctl, structures over the run page.

What pykvm's overhead is compared with. It is straightforward, not slow on purpose: fields are read
once, attribute look-ups are hoisted where a programmer would, and handlers get plain integers.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64

KVM_RUN = 0xAE80
KVM_EXIT_IO = 2
KVM_EXIT_IO_OUT = 1
KVM_EXIT_MMIO = 6

libc = ctypes.CDLL(None, use_errno=True)


class Io(ctypes.Structure):
    """``kvm_run.io``."""

    _fields_ = (
        ("direction", c_uint8),
        ("size", c_uint8),
        ("port", c_uint16),
        ("count", c_uint32),
        ("data_offset", c_uint64),
    )


class Mmio(ctypes.Structure):
    """``kvm_run.mmio``."""

    _fields_ = (
        ("phys_addr", c_uint64),
        ("data", c_uint8 * 8),
        ("len", c_uint32),
        ("is_write", c_uint8),
    )


class Exit(ctypes.Union):
    """What the exit reason selects."""

    _fields_ = (("io", Io), ("mmio", Mmio), ("padding", c_uint8 * 256))


class KvmRun(ctypes.Structure):
    """``struct kvm_run``, as far as it is needed."""

    _anonymous_ = ("exit",)
    _fields_ = (
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("exit", Exit),
    )


class PlainVcpu:
    """A vCPU and the handlers of what its guest writes: ``handler(address, value)``."""

    def __init__(self, fd: int, run_size: int) -> None:
        self.fd = fd
        self.map = mmap.mmap(fd, run_size)
        self.run_page = KvmRun.from_buffer(self.map)
        self.base = ctypes.addressof(self.run_page)
        self.ports: dict[int, Callable[[int, int], object]] = {}
        self.mmio: dict[int, Callable[[int, int], object]] = {}

    def run(self, exits: int) -> None:
        """Run until so many exits were handled."""
        run = self.run_page
        for _ in range(exits):
            if libc.ioctl(self.fd, KVM_RUN, 0) < 0:
                error = ctypes.get_errno()
                raise OSError(error, os.strerror(error))
            reason = run.exit_reason
            if reason == KVM_EXIT_IO:
                io = run.io
                if io.direction == KVM_EXIT_IO_OUT:
                    data = ctypes.string_at(self.base + io.data_offset, io.size * io.count)
                    port = io.port
                    self.ports[port](port, int.from_bytes(data, "little"))
            elif reason == KVM_EXIT_MMIO:
                mmio = run.mmio
                if mmio.is_write:
                    address = mmio.phys_addr
                    value = int.from_bytes(bytes(mmio.data[: mmio.len]), "little")
                    self.mmio[address](address, value)
            else:
                raise RuntimeError(f"unhandled exit {reason}")

    def close(self) -> None:
        """Unmap the run page."""
        del self.run_page
        self.map.close()
