"""Which KVM is here, found by looking; for the test report."""

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


def describe_backend() -> str:
    """The back end and the kernel: ``kvm-amd, Linux 6.1.0-37-amd64``."""
    try:
        from pykvm.doctor import backend
    except ImportError as error:  # the tests will say more; a report must not end in a traceback
        return f"pykvm cannot be imported: {error}"
    return backend()
