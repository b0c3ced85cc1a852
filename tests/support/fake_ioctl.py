"""A kernel that is not there: it takes the place of the one door all ioctls pass through.

It records what each ioctl was given (file descriptor, request number, bytes of the argument) and
answers as a test tells it to. So the encoding of an ioctl can be held against the kernel's ABI
where no KVM has that ioctl, and an error can be had that no KVM gives at will.

File descriptors it hands out are real (a memfd each), so that mapping and closing them works.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pykvm import host
from pykvm._abi import ffi, lib
from pykvm.kvm import Kvm, Vcpu, Vm
from pykvm.kvm import ioctl as door

MMAP_SIZE = 3 * 4096

#: An answer: what the ioctl returns (negative: -errno), or a function of its argument that does.
Answer = int | Callable[[Any], int]


@dataclass(frozen=True)
class Call:
    """One ioctl as the kernel would have seen it."""

    name: str
    fd: int
    request: int
    #: Bytes of the structure, with the entries behind it; None where the argument is a number.
    data: bytes | None
    #: The argument where it is a number (0 for none).
    number: int


class FakeKernel:
    """Records and answers ioctls.

    Attributes:
        calls: what was asked, oldest first, without KVM_CHECK_EXTENSION.
        probed: the capabilities that were asked for.
        caps: what KVM_CHECK_EXTENSION answers, by name; ``cap_default`` for the others.
        answers: what the other ioctls answer, by name; 0 for the others.
    """

    def __init__(self, cap_default: int = 1) -> None:
        self.calls: list[Call] = []
        self.probed: list[str] = []
        self.caps: dict[str, int] = {}
        self.cap_default = cap_default
        self.answers: dict[str, Answer] = {
            "KVM_GET_API_VERSION": 12,
            "KVM_GET_VCPU_MMAP_SIZE": MMAP_SIZE,
            "KVM_CREATE_VM": lambda arg: self._fd("vm"),
            "KVM_CREATE_VCPU": lambda arg: self._fd("vcpu"),
            "KVM_CREATE_DEVICE": self._create_device,
            "KVM_CREATE_GUEST_MEMFD": lambda arg: self._fd("guest_memfd"),
            "KVM_GET_MSRS": lambda arg: int(arg.nmsrs),
            "KVM_SET_MSRS": lambda arg: int(arg.nmsrs),
        }

    def raw(self, fd: int, request: int, arg: Any) -> int:
        """What stands in for ``lib.pykvm_ioctl``."""
        name = _name_of(request, door_name.get())
        if fd < 0:
            return -errno.EBADF
        if name == "KVM_CHECK_EXTENSION":
            cap = _cap_name(int(ffi.cast("uintptr_t", arg)))
            self.probed.append(cap)
            return self.caps.get(cap, self.cap_default)
        ctype = ffi.typeof(arg)
        if ctype.cname == "void *":
            data, number = None, int(ffi.cast("uintptr_t", arg))
        else:
            # The kernel copies as much as the request number says: the structure must have that.
            # (KVM_REINJECT_CONTROL is declared without its structure.)
            size = (request >> 16 & 0x3FFF) or ffi.sizeof("struct kvm_reinject_control")
            assert ffi.sizeof(ctype.item) == size, f"{name} takes {size} bytes, not a {ctype.cname}"
            if ctype.item.kind == "struct":
                size = max(size, ffi.sizeof(arg[0]))
            data, number = bytes(ffi.buffer(ffi.cast("char *", arg), size)), 0
        self.calls.append(Call(name, fd, request, data, number))
        answer = self.answers.get(name, 0)
        return answer if isinstance(answer, int) else answer(arg)

    @property
    def last(self) -> Call:
        """The latest call."""
        return self.calls[-1]

    def named(self, name: str) -> list[Call]:
        """All calls of one ioctl."""
        return [call for call in self.calls if call.name == name]

    def _fd(self, kind: str) -> int:
        fd = os.memfd_create(f"fake-{kind}")
        os.truncate(fd, MMAP_SIZE + 64 * 4096 + (1 << 16))
        return fd

    def _create_device(self, arg: Any) -> int:
        arg.fd = 0 if arg.flags & lib.KVM_CREATE_DEVICE_TEST else self._fd("device")
        return 0


class _DoorName:
    """The name under which the door issues the ioctl at hand: numbers are not unique."""

    def __init__(self) -> None:
        self.name = ""

    def get(self) -> str:
        return self.name


door_name = _DoorName()


class _Requests(dict[str, int]):
    """Stands in for the door's table of request numbers, and sees which is looked up."""

    def __getitem__(self, name: str) -> int:
        door_name.name = name
        number: int = getattr(lib, name)
        return number


def _name_of(request: int, name: str) -> str:
    assert getattr(lib, name) & 0xFFFFFFFF == request & 0xFFFFFFFF
    return name


def _cap_name(number: int) -> str:
    for name in dir(lib):
        if name.startswith("KVM_CAP_") and getattr(lib, name) == number:
            return name
    return str(number)


@contextmanager
def fake_kernel(cap_default: int = 1) -> Iterator[FakeKernel]:
    """Put a fake kernel behind the door, and the real one back afterwards.

    What one kernel said is not known of another.
    """
    kernel = FakeKernel(cap_default)
    raw, requests, hosts = door.raw, door.requests, host._hosts
    door.raw = kernel.raw
    door.requests = _Requests()  # type: ignore[assignment]
    host._hosts = {}
    try:
        yield kernel
    finally:
        door.raw = raw
        door.requests = requests
        host._hosts = hosts


@contextmanager
def fake_vcpu(cap_default: int = 1) -> Iterator[tuple[FakeKernel, Kvm, Vm, Vcpu]]:
    """A fake kernel with a Kvm, a Vm and a Vcpu on it; what making them asked is forgotten."""
    with (
        fake_kernel(cap_default) as kernel,
        Kvm("/dev/null") as kvm,
        kvm.create_vm() as vm,
        vm.create_vcpu(0) as vcpu,
    ):
        kernel.calls.clear()
        yield kernel, kvm, vm, vcpu


def put(address: int, data: bytes) -> int:
    """Write bytes where an ioctl's structure points to, as the kernel would; an answer of 0."""
    ffi.memmove(ffi.cast("char *", address), data, len(data))
    return 0


def peek(address: int, size: int) -> bytes:
    """Read the bytes that an ioctl's structure points to, as the kernel would."""
    return bytes(ffi.buffer(ffi.cast("char *", address), size))
