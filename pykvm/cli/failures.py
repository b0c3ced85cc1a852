"""How errors are told: one message on standard error, and standard output left in order."""

from __future__ import annotations

import os
import sys

from pykvm.errors import PykvmError


def message(error: Exception) -> str:
    """What went wrong, with the name of the file if it is about one."""
    if isinstance(error, OSError) and not isinstance(error, PykvmError):
        reason = error.strerror or str(error)
        return f"{error.filename}: {reason}" if error.filename else reason
    return str(error)


def settle_output() -> None:
    """Let what cannot be written go nowhere: the interpreter would stumble over it at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
