"""How errors are told: one message on standard error, and standard output left in order."""

from __future__ import annotations

import os
import sys

from pykvm.errors import PykvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO


def message(error: Exception) -> str:
    """What went wrong, with the name of the file if it is about one."""
    if isinstance(error, OSError) and not isinstance(error, PykvmError):
        reason = error.strerror or str(error)
        return f"{error.filename}: {reason}" if error.filename else reason
    return str(error)


def tell(text: str) -> None:
    """Write a line on standard error; where that cannot be, the exit code says it all the same."""
    if sys.stderr is None:  # closed when we started: print() would take standard output
        return
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _settle(sys.stderr)


def settle_output() -> None:
    """Let what cannot be written go nowhere: the interpreter would stumble over it at its end."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            _settle(stream)


def _settle(stream: TextIO) -> None:
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
