"""What /proc says of a machine that is not this one."""

from __future__ import annotations

MISC_WITH_KVM = "232 kvm\n200 tun\n"
MISC_WITHOUT = "200 tun\n 59 kvmish\n"


def cpuinfo(*flags: str, vendor: str = "GenuineIntel") -> str:
    """A /proc/cpuinfo of two processors, of which the first has these flags."""
    return (
        f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: A Processor\n"
        f"flags\t\t: fpu {' '.join(flags)}\n\n"
        f"processor\t: 1\nvendor_id\t: {vendor}\nflags\t\t: fpu vmx svm\n"
    )
