"""The one door through which every ioctl of this package passes.

``call(handle, "KVM_GET_REGS", regs)`` issues the ioctl on the handle's file descriptor, raises
:class:`~pykvm.errors.KvmError` with the reason in words when the kernel refuses, and returns the
kernel's value (0, or the number, length or file descriptor the ioctl returns).

The name is the key: the request number comes from the kernel's header, the trace prints the name,
and the table of hints is looked up by it. Three module globals can be replaced:

* ``raw(fd, request, arg)``: issues the system call and returns its value or -errno. Tests put a
  fake here.
* ``tracer``: None, or what stands in for :func:`issue` while tracing is on
  (:mod:`pykvm.kvm.tracing`). Tracing that is off costs one comparison.
* ``witnesses``: each is told what was done, after the kernel did it (:mod:`pykvm.replay`).
"""

from __future__ import annotations

import errno as _errno

from pykvm._abi import ffi, lib
from pykvm.errors import ClosedError, KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from .handle import Handle

NULL = ffi.NULL

raw: Callable[[int, int, Any], int] = lib.pykvm_ioctl
tracer: Callable[[Handle, str, Any], int] | None = None
witnesses: list[Callable[[Handle, str, Any], None]] = []


class _Requests(dict[str, int]):
    """Request numbers by name, filled from the header as they are used."""

    def __missing__(self, name: str) -> int:
        number: int = getattr(lib, name)
        self[name] = number
        return number


requests = _Requests()


def call(handle: Handle, name: str, arg: Any = NULL) -> int:
    """Issue one ioctl; return the kernel's value, which is never negative.

    Args:
        handle: the object whose file descriptor it is for.
        name: the ioctl's name in linux/kvm.h.
        arg: a cffi pointer to the structure, or nothing.

    Errors: :class:`ClosedError` when the handle is closed; :class:`KvmError` for everything the
    kernel refuses. EINTR is retried after Python's signal handlers had their turn, except for
    KVM_RUN, where it is an answer.
    """
    trace = tracer  # another thread may end the trace at any moment
    result = raw(handle._fd, requests[name], arg) if trace is None else trace(handle, name, arg)
    if result < 0:
        if result == -_errno.EINTR and name != "KVM_RUN":
            return call(handle, name, arg)
        fail(handle, name, -result)
    for witness in witnesses:
        witness(handle, name, arg)
    return result


def issue(handle: Handle, name: str, arg: Any) -> int:
    """Issue one ioctl and return the kernel's value or -errno, untraced and unjudged."""
    return raw(handle._fd, requests[name], arg)


def call_int(handle: Handle, name: str, value: int) -> int:
    """Issue an ioctl whose argument is a plain number, not a pointer; see :func:`call`.

    The number must fit an ``unsigned long``; a negative one or a larger one is a
    :class:`ValueError`, because C would silently cut it.
    """
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{name}: {value:#x} does not fit an unsigned long")
    return call(handle, name, ffi.cast("void *", value) if value else NULL)


def fail(handle: Handle, name: str, errno: int) -> NoReturn:
    """Raise what the refusal of an ioctl means."""
    if handle._fd < 0:
        raise ClosedError(f"{name}: this {handle.kind} is closed")
    from .hints import hint

    raise KvmError(name, errno, hint(name, errno))


def tracing() -> bool:
    """Whether ioctls are being traced, so that a loop written in C knows to report its own."""
    return tracer is not None
