"""The exceptions of pykvm, as a tree.

::

    PykvmError
    ├ KvmError(OSError)             an ioctl failed: .ioctl, .errno, and the reason in words
    ├ CapabilityError               a missing KVM_CAP_*, no /dev/kvm, no permission: with the remedy
    ├ GuestMemoryError(ValueError)  an access outside guest RAM: .gpa, .length and the map
    ├ GuestError                    a guest's driver broke its device's protocol
    ├ BusOverlapError(ValueError)   two handlers claim the same port or address
    ├ AsmError(ValueError)          the assembler refused a line, or there is no assembler
    ├ BootError(ValueError)         an image cannot be loaded: which field, expected and found
    ├ DiskError                     a disk cannot be had: who holds it, or what has to be installed
    ├ SnapshotError(ValueError)     a snapshot is damaged, newer, or not of this machine: the reason
    ├ ReplayError(ValueError)       a run cannot be recorded, or went another way than its log
    ├ VcpuExitError                 FAIL_ENTRY, INTERNAL_ERROR, SHUTDOWN: .exit and the explanation
    ├ RunError                      a run ended early (time-out, limit, unclaimed exit): .result
    ├ BusyError(RuntimeError)       the vCPU is running in another thread
    └ ClosedError(ValueError)       the object was closed

What a guest does never raises here by itself: a run ends in a ``RunResult``, and only
``RunResult.check()`` raises.
"""

from __future__ import annotations

import errno as _errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class PykvmError(Exception):
    """Base of every exception that pykvm raises on purpose."""


class KvmError(PykvmError, OSError):
    """An ioctl on a KVM file descriptor failed.

    Attributes:
        ioctl: the ioctl's own name, ``KVM_SET_SREGS``.
        errno: the positive error number.
        hint: what the error means for this ioctl, in words, or "".
    """

    def __init__(self, ioctl: str, errno: int, hint: str = "") -> None:
        text = os.strerror(errno)
        super().__init__(errno, text)
        self.ioctl = ioctl
        self.hint = hint

    def __str__(self) -> str:
        name = _errno.errorcode.get(self.errno or 0, str(self.errno))
        text = f"{self.ioctl}: {name} ({self.strerror})"
        return f"{text}: {self.hint}" if self.hint else text

    def __reduce__(self) -> tuple[type[KvmError], tuple[str, int, str]]:
        return KvmError, (self.ioctl, self.errno or 0, self.hint)


class CapabilityError(PykvmError):
    """This KVM, or this process, cannot do what was asked.

    Attributes:
        capability: the missing capability, ``KVM_CAP_SREGS2``, or "" when KVM itself is missing.
    """

    def __init__(self, message: str, capability: str = "") -> None:
        super().__init__(message)
        self.capability = capability


class GuestMemoryError(PykvmError, ValueError):
    """An access touched guest-physical addresses that are not RAM, or RAM that is read-only.

    Attributes:
        gpa: first guest-physical address of the access.
        length: its length in bytes.
    """

    def __init__(self, message: str, gpa: int = 0, length: int = 0) -> None:
        super().__init__(message)
        self.gpa = gpa
        self.length = length


class GuestError(PykvmError):
    """The driver in the guest broke the protocol of its device.

    It stays inside: the device asks to be reset, and the guest goes on.
    """


class BusOverlapError(PykvmError, ValueError):
    """Two claims on a bus overlap."""


class AsmError(PykvmError, ValueError):
    """The assembler refused the source, or none is installed."""


class BootError(PykvmError, ValueError):
    """An image cannot be loaded: the message names the field, what was expected and found."""


class DiskError(PykvmError):
    """A disk cannot be opened as asked: the message says who holds it, or what to install."""


class SnapshotError(PykvmError, ValueError):
    """A snapshot cannot be taken, read or restored: the message says why."""


class ReplayError(PykvmError, ValueError):
    """What cannot be recorded or replayed, and why; or where a replay went another way."""


class VcpuExitError(PykvmError):
    """A vCPU cannot go on: failed entry, internal error or shutdown.

    Attributes:
        exit: the decoded exit (``pykvm.kvm.exits``), or None.
    """

    def __init__(self, message: str, exit: Any = None) -> None:
        super().__init__(message)
        self.exit = exit


class RunError(PykvmError):
    """A run did not end as ``RunResult.check()`` wants it to.

    Attributes:
        result: the ``RunResult``.
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


class BusyError(PykvmError, RuntimeError):
    """The vCPU is running in another thread: stop it first."""


class ClosedError(PykvmError, ValueError):
    """The object was closed; nothing can be asked of it any more."""
