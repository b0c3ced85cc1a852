"""What every object around a KVM file descriptor has in common: its life, and its capabilities."""

from __future__ import annotations

import os
from _warnings import warn  # `warnings` itself costs an import, and cannot be had at exit

from pykvm._abi import lib
from pykvm.errors import CapabilityError, ClosedError

from .ioctl import call_int

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    #: What methods that read bytes take.
    BytesLike = bytes | bytearray | memoryview


class Closing:
    """A context manager of what has a ``close``."""

    __slots__ = ()

    def close(self) -> None:
        """Give back what it holds. A second call does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Handle(Closing):
    """An owned file descriptor: a context manager with an idempotent ``close``.

    The file descriptors of KVM are close-on-exec. A handle that is dropped without ``close`` is
    closed by the garbage collector, with a :class:`ResourceWarning`. They belong to the process
    that made them: after ``fork`` the child's ioctls fail with EIO.
    """

    __slots__ = ("__weakref__", "_fd")

    #: What it is, as messages and the trace call it.
    kind = "file descriptor"

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def fd(self) -> int:
        """The file descriptor; :class:`ClosedError` once closed."""
        if self._fd < 0:
            raise ClosedError(f"this {self.kind} is closed")
        return self._fd

    def fileno(self) -> int:
        """The file descriptor, for ``select`` and friends."""
        return self.fd

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._fd < 0

    def close(self) -> None:
        """Close the file descriptor. A second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            message = f"unclosed {self!r}"
            self.close()  # first: a warning may be made an error
            warn(message, ResourceWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        state = "closed" if self._fd < 0 else f"fd {self._fd}"
        return f"<pykvm.kvm.{type(self).__name__} {state}>"


class CapHandle(Handle):
    """A handle that answers KVM_CHECK_EXTENSION: the system, and a VM."""

    __slots__ = ("_caps",)

    def __init__(self, fd: int, caps: dict[str, int]) -> None:
        self._fd = fd
        self._caps = caps  # what need() already asked; shared by VMs of one Kvm and type

    def check_extension(self, cap: int | str) -> int:
        """KVM_CHECK_EXTENSION (api.rst 4.4): what this KVM says of a capability.

        Args:
            cap: a ``KVM_CAP_*`` number, or its name.

        Returns: 0 if it is missing; else 1, or a number whose meaning belongs to the capability
        (a maximum, a size in bytes, a mask of flags).

        Errors: :class:`ValueError` for a name that no capability has.

        Asked of a VM the answer is for that VM (its type may matter); asked of the system it is
        for KVM as a whole. Always asks the kernel.
        """
        number = _number(cap) if isinstance(cap, str) else cap
        return call_int(self, "KVM_CHECK_EXTENSION", number)

    def need(self, cap: str) -> int:
        """What this KVM says of capability ``cap``, asked once and remembered.

        Errors: :class:`CapabilityError` naming the capability and what it stands for, if missing.
        """
        caps = self._caps
        value = caps.get(cap)
        if value is None:
            value = caps[cap] = self.check_extension(cap)
        if not value:
            raise missing(cap)
        return value


def _number(name: str) -> int:
    if name[:8] == "KVM_CAP_" and (number := getattr(lib, name, None)) is not None:
        return int(number)
    from difflib import get_close_matches

    from .caps import DESCRIPTIONS

    wanted = name.upper()
    if not wanted.startswith("KVM_CAP_"):
        wanted = f"KVM_CAP_{wanted}"
    like = get_close_matches(wanted, DESCRIPTIONS, cutoff=0.8)
    about = f": {', '.join(like)}?" if like else ""
    raise ValueError(f"no capability is called {name!r}{about}")


def missing(cap: str) -> CapabilityError:
    """The error that says capability ``cap`` is missing, and what it stands for."""
    from .caps import describe

    text = describe(cap)
    about = f" ({text})" if text else ""
    return CapabilityError(f"this KVM does not have {cap}{about}", cap)
