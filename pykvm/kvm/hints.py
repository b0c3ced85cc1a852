"""What an errno means for the ioctl that returned it, in words. Loaded when something failed."""

from __future__ import annotations

import errno as _errno

_E = _errno

#: (ioctl, errno) → meaning, from api.rst and the kernel's arch/x86/kvm and virt/kvm.
HINTS: dict[tuple[str, int], str] = {}


def hint(name: str, errno: int, kind: str = "") -> str:
    """What ``errno`` means when ioctl ``name`` fails with it, or ""."""
    return HINTS.get((name, errno), "")


def no_kvm(path: str, errno: int) -> str:
    """Why ``path`` cannot be opened, and what to do about it."""
    return f"{path} cannot be opened: {_errno.errorcode.get(errno, errno)}"
