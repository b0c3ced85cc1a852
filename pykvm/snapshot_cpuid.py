"""What kind of processor a snapshot is of, and whether this host has the like."""

from __future__ import annotations

from pykvm.errors import PykvmError
from pykvm.kvm.flex import CPUID_ENTRY_SIZE, from_bytes, to_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.cpu import Cpu
    from pykvm.machine import Machine

TSC_TOLERANCE_PPM = 250
"""Frequencies that differ by less are the same crystal measured twice."""


_host: list[Any] = [None, None]
"""The host asked last, and its leaves as text."""


def as_text(cpu: Cpu) -> list[str] | None:
    """The CPUID leaves that a machine was made from, each as hexadecimal bytes."""
    return [to_bytes(entry).hex() for entry in cpu.supported] or None


def check(text: list[str] | None) -> None:
    """ValueError or TypeError unless a file's leaves are what :func:`as_text` makes. Asks no KVM.

    All at once: a snapshot that is loaded to run has no time for one after the other.
    """
    if text is None:
        return
    size = CPUID_ENTRY_SIZE
    data = bytes.fromhex("".join(text)) if type(text) is list else b""  # of blanks, nothing
    if not data or len(data) != len(text) * size or {*map(len, text)} != {2 * size}:
        raise ValueError("its CPUID leaves are none")


def entries(text: list[str] | None) -> Any:
    """What ``Machine(cpuid=)`` takes for it: "host" where that is the same. Asks KVM.

    Raises:
        CapabilityError: there is no usable KVM.
    """
    if text is None:
        return None
    from pykvm.host import open_kvm

    kvm, host = open_kvm("/dev/kvm")
    kvm.close()
    if _host[0] is not host:
        _host[:] = host, [to_bytes(entry).hex() for entry in host.cpuid[0]]
    if _host[1] == text:
        return "host"
    return [from_bytes(bytes.fromhex(each)) for each in text]


def tsc_khz(machine: Machine) -> int:
    """The guest's TSC frequency; 0 where KVM does not tell."""
    try:
        return machine._runners[0].vcpu.get_tsc_khz()
    except PykvmError:
        return 0


def same_tsc(machine: Machine, khz: int) -> None:
    """Have the guest's TSC run as fast as it did, or warn."""
    now = tsc_khz(machine)
    if not khz or not now or abs(now - khz) * 1_000_000 <= khz * TSC_TOLERANCE_PPM:
        return
    try:
        for runner in machine._runners:
            runner.vcpu.set_tsc_khz(khz)
    except PykvmError:
        import warnings

        warnings.warn(
            f"the guest's TSC ran at {khz} kHz and runs at {now} kHz here: its clocks will be wrong"
            " (this KVM lacks KVM_CAP_TSC_CONTROL)",
            RuntimeWarning,
            stacklevel=4,
        )
