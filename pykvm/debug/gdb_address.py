"""Where a gdb stub listens: on this machine only, unless it is told otherwise.

Who connects owns the guest, and with it whatever a guest may do here.
"""

from __future__ import annotations

import os
import socket

DEFAULT = "127.0.0.1:1234"
_MOST_PATH = 107  # bytes; sun_path holds 108 with its NUL (unix(7))


def listen(text: str, anywhere: bool = False) -> tuple[socket.socket, str]:
    """Listen at ``PORT``, ``HOST:PORT`` or the path of a Unix socket.

    Args:
        text: port 0 is any that is free. HOST is a numeric address or ``localhost``. A path has a
            slash in it.
        anywhere: let HOST be other than a loopback address.

    Returns:
        The socket, and the address as gdb's ``target remote`` takes it.

    Raises:
        ValueError: no address, one that others can reach, or a path too long for a socket.
        OSError: it is taken.
    """
    text = text or DEFAULT
    if "/" in text:
        return _unix(text.removeprefix("unix:")), text.removeprefix("unix:")
    host, _, port = text.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not port.isdecimal() or int(port) > 0xFFFF:
        raise ValueError(f"{text!r}: PORT, HOST:PORT, or a path with a slash")
    host = "127.0.0.1" if host == "localhost" else host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        packed = socket.inet_pton(family, host)
    except OSError:
        raise ValueError(f"{host!r} is no numeric address") from None
    local = packed[0] == 127 if family == socket.AF_INET else packed == bytes(15) + b"\1"
    if not local and not anywhere:
        raise ValueError(
            f"{host} can be reached from elsewhere, and who reaches it owns the guest: listen on "
            "127.0.0.1, or say that you mean it"
        )
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, int(port)))
        listener.listen(1)
    except BaseException:
        listener.close()
        raise
    bound = listener.getsockname()[1]
    return listener, f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"


def _unix(path: str) -> socket.socket:
    """For this user alone."""
    if (length := len(os.fsencode(path))) > _MOST_PATH:
        raise ValueError(f"{path}: a socket's path has at most {_MOST_PATH} bytes, not {length}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(path)
        listener.listen(1)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener
