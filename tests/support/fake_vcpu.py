"""A runner whose KVM_RUN is a script: the whole loop, C and Python, without /dev/kvm."""

from __future__ import annotations

import time
from typing import Any

from pykvm._abi import ffi, lib
from pykvm.devices.bus import Bus
from pykvm.vcpu_thread import NEVER, End, Runner

PAGES = 3


class FakeVcpu:
    """What Runner wants of a Vcpu: a run page, and the completions of an MSR exit."""

    def __init__(self) -> None:
        self._memory = ffi.new("char[]", PAGES * 4096)
        self.kvm_run = ffi.cast("struct kvm_run *", self._memory)
        self.fd = -1
        self._fd = 0
        self.kind = "fake"

    def close(self) -> None:
        pass


def pio(
    port: int, data: bytes | None = None, *, size: int = 1, count: int = 1, stop: bool = False
) -> dict[str, Any]:
    """A KVM_EXIT_IO: OUT of ``data``, or IN of ``count`` items."""
    exit: dict[str, Any] = {
        "reason": lib.KVM_EXIT_IO, "address": port, "size": size, "count": count,
        "is_write": data is not None, "stop": stop,
    }  # fmt: skip
    if data is not None:
        exit["count"] = len(data) // size
        exit["data"] = list(data)
    return exit


def mmio(gpa: int, data: bytes | None = None, *, size: int = 4) -> dict[str, Any]:
    """A KVM_EXIT_MMIO: a store of ``data``, or a load of ``size`` bytes."""
    exit: dict[str, Any] = {
        "reason": lib.KVM_EXIT_MMIO, "address": gpa, "size": size, "is_write": data is not None,
    }  # fmt: skip
    if data is not None:
        exit |= {"size": len(data), "data": list(data)}
    return exit


def other(reason: int) -> dict[str, Any]:
    """Any other exit."""
    return {"reason": reason}


def error(number: int) -> dict[str, Any]:
    """KVM_RUN fails."""
    return {"reason": lib.KVM_EXIT_UNKNOWN, "error": number}


HLT = other(lib.KVM_EXIT_HLT)


class FakeRun:
    """A runner with its two buses over a script of exits, which repeats for ever."""

    def __init__(self, *script: dict[str, Any]) -> None:
        slots: list[Any] = []
        self.pio = Bus("pio", slots)
        self.mmio = Bus("mmio", slots)
        self.hooks: dict[int, Any] = {}
        self.vcpu = FakeVcpu()
        self.runner = Runner(
            self.vcpu,  # type: ignore[arg-type]
            0,
            slots,
            (self.pio, self.mmio),
            self.hooks,
            {},
            sync_regs=True,
        )
        self.script = ffi.new("struct pykvm_fake_exit[]", list(script))
        self._fake = ffi.new("struct pykvm_fake *", {"script": self.script, "count": len(script)})
        self.c = self.runner.c
        self.c.fake = self._fake
        self.c.enter = ffi.addressof(lib, "pykvm_fake_enter")

    def answered(self, index: int, size: int) -> bytes:
        """What the guest was given for the read at ``index`` of the script."""
        return bytes(self.script[index].data)[:size]


def run(fake: FakeRun, max_exits: int | None = None, seconds: float | None = None) -> End:
    """Run it: so many exits, so long."""
    deadline = NEVER if seconds is None else time.monotonic_ns() + int(seconds * 1e9)
    return fake.runner.run(deadline, max_exits)
