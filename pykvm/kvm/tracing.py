"""Print every ioctl with its structures and its result, as strace would if it knew KVM.

::

    with pykvm.kvm.trace(sys.stderr):
        ...

    ioctl(vm 4, KVM_SET_USER_MEMORY_REGION, {slot=0, flags=0, guest_phys_addr=0x0, …}) = 0
    ioctl(vcpu 5, KVM_RUN) = 0 IoExit(port=0xe9, …)
    ioctl(vcpu 5, KVM_SET_SREGS, {cs={…}, …}) = -1 EINVAL (Invalid argument)
"""

from __future__ import annotations

import errno as _errno
import os
from _thread import RLock, _local

from pykvm._abi import ffi

from . import ioctl as door

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .handle import Handle

    Sink = Callable[[str], object]

_lock = RLock()
_sinks: tuple[Sink, ...] = ()
_busy = _local()  # set in a thread that is printing: what a sink itself asks of KVM is not traced


class Trace:
    """A trace that is on from ``with`` to its end; made by :func:`trace`.

    It sees the ioctls of all threads. Traces nest: each sink gets every line. Lines of threads do
    not mix.
    """

    __slots__ = ("_sink",)

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def __enter__(self) -> Trace:
        global _sinks
        with _lock:
            _sinks = (*_sinks, self._sink)
            door.tracer = _traced
        return self

    def __exit__(self, *args: object) -> None:
        global _sinks
        with _lock:
            sinks = list(_sinks)
            for index in reversed(range(len(sinks))):
                if sinks[index] is self._sink:
                    del sinks[index]
                    break
            _sinks = tuple(sinks)
            if not sinks:
                door.tracer = None


def trace(sink: Any = None) -> Trace:
    """A context manager that prints every ioctl of this process while it is on.

    Args:
        sink: where the lines go: something callable with a line, a text file, or a list. Without
            it, standard error.

    An exception that a sink raises comes through, after the ioctl was made.
    """
    if sink is None:
        import sys

        sink = sys.stderr
    if callable(sink):
        return Trace(sink)
    if hasattr(sink, "write"):
        write = sink.write
        return Trace(lambda line: write(line + "\n"))
    if hasattr(sink, "append"):
        return Trace(sink.append)
    raise TypeError(f"a trace goes to a callable, a file or a list, not to {sink!r}")


def log_run(vcpu: Handle, result: int) -> None:
    """Print a KVM_RUN that was made elsewhere (by the loop in C).

    Args:
        vcpu: the :class:`Vcpu`; its run page still holds the exit.
        result: what KVM_RUN returned: 0, or -errno.
    """
    if not getattr(_busy, "on", False):
        _emit(_line(vcpu, "KVM_RUN", "", result, ""))


def _traced(handle: Handle, name: str, arg: Any) -> int:
    """Issue an ioctl for the door, and print it."""
    if getattr(_busy, "on", False):
        return door.issue(handle, name, arg)
    from .decode import argument, number, snapshot

    before: bytes | None = None
    text = ""
    if arg != door.NULL or _is_number(name):
        if ffi.typeof(arg).cname == "void *":
            text = number(name, int(ffi.cast("uintptr_t", arg)))
        else:
            before = snapshot(arg)
    result = door.issue(handle, name, arg)
    after = ""
    if before is not None:
        if result >= 0:
            now = snapshot(arg, len(before))
            if _only_answers(name):
                text = argument(arg, now)
            else:
                text = argument(arg, before)
                if now != before:
                    after = argument(arg, now, before)
        elif _only_answers(name) and not any(before):
            text = "{}"
        else:
            text = argument(arg, before)
    _emit(_line(handle, name, text, result, after))
    return result


def _is_number(name: str) -> bool:
    """Whether a zero is a number rather than no argument."""
    return name in (
        "KVM_CREATE_VM",
        "KVM_CREATE_VCPU",
        "KVM_CHECK_EXTENSION",
        "KVM_SET_TSS_ADDR",
        "KVM_SET_BOOT_CPU_ID",
        "KVM_SET_TSC_KHZ",
        "KVM_SET_NR_MMU_PAGES",
    )


def _only_answers(name: str) -> bool:
    """Whether what was asked stands in the answer as well, so that the answer alone will do."""
    return "_GET_" in name or name == "KVM_TRANSLATE"


def _line(handle: Handle, name: str, text: str, result: int, after: str) -> str:
    head = f"ioctl({handle.kind} {handle._fd}, {name}{', ' if text else ''}{text})"
    if after:
        after = f" => {after}"
    if result < 0:
        code = _errno.errorcode.get(-result, str(-result))
        tail = f" = -1 {code} ({os.strerror(-result)}){after}"
    else:
        tail = f" = {result}{after}"
    return head + tail + (_exit(handle, result) if name == "KVM_RUN" else "")


def _exit(vcpu: Any, result: int) -> str:
    from .exits import decode, decode_failed

    run = getattr(vcpu, "_run", None)
    if run is None:
        return ""
    exit = decode(run) if result >= 0 else decode_failed(run, -result)
    return "" if exit is None else f" {exit!r}"


def _emit(line: str) -> None:
    _busy.on = True
    try:
        with _lock:
            for sink in _sinks:
                sink(line)
    finally:
        _busy.on = False
