"""Which KVM is here, found by looking; for the test report and for tests of the rig."""

from __future__ import annotations

import os

#: Another path stands in for it in the tests of the harness itself.
KVM_DEVICE = os.environ.get("PYKVM_TEST_DEVICE", "/dev/kvm")


def kvm_problem(path: str = KVM_DEVICE) -> str:
    """Why KVM cannot be used here, in words, or "" when it can."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"cannot open {path}: {error.strerror}"
    os.close(fd)
    return ""


def describe_backend(sys_module: str = "/sys/module") -> str:
    """The KVM modules in the kernel and its release: ``kvm_amd, Linux 6.1.0-37-amd64``."""
    try:
        loaded = sorted(name for name in os.listdir(sys_module) if name.startswith("kvm_"))
    except OSError:
        loaded = []
    modules = " ".join(loaded) or "no KVM module seen"
    return f"{modules}, Linux {os.uname().release}"
