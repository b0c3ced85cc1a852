"""The packets of gdb's remote protocol: how bytes become packets, and packets bytes.

"Debugging with GDB", appendix E: a packet is ``$payload#cs``, answered with ``+`` or ``-`` until
both sides agree to leave that out; 0x03 between packets is Ctrl-C.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 0x4000
"""The largest payload that is taken, as ``qSupported`` says: bytes between ``$`` and ``#``."""

INTERRUPT = object()
"""Ctrl-C."""
BROKEN = object()
"""A packet whose checksum is wrong, or that is too long: ask for it again."""

_ESCAPED = frozenset(b"#$}*")


class Reader:
    """Takes bytes as they come, in pieces of any size.

    Whatever comes, it holds no more than one packet.
    """

    def __init__(self) -> None:
        self._payload: bytearray | None = None  # between $ and #
        self._sum: bytearray | None = None  # behind #

    def feed(self, data: bytes) -> Iterator[bytes | object]:
        """Yield what is complete: payloads, unescaped, INTERRUPT and BROKEN."""
        for byte in data:
            if self._sum is not None:
                self._sum.append(byte)
                if len(self._sum) == 2:
                    yield self._complete()
            elif self._payload is not None:
                if byte == 0x23:  # '#'
                    self._sum = bytearray()
                elif byte == 0x24:  # '$': what came before was cut off
                    self._payload.clear()
                elif len(self._payload) <= SIZE:
                    self._payload.append(byte)
            elif byte == 0x24:
                self._payload = bytearray()
            elif byte == 0x03:
                yield INTERRUPT
            # Everything else between packets, '+' and '-' too, needs no answer: the connection is
            # one that does not lose bytes.

    def _complete(self) -> bytes | object:
        assert self._payload is not None and self._sum is not None
        payload, digits = bytes(self._payload), bytes(self._sum)
        self._payload = self._sum = None
        try:
            wanted = int(digits, 16) if digits.isalnum() else -1
        except ValueError:
            wanted = -1
        if wanted != sum(payload) & 0xFF or len(payload) > SIZE:
            return BROKEN
        return unescape(payload)


def unescape(payload: bytes) -> bytes:
    """Take the escapes (``}``, and the byte XOR 0x20) out of a payload."""
    if b"}" not in payload:
        return payload
    plain, rest = bytearray(), iter(payload)
    for byte in rest:
        plain.append(next(rest, 0x20) ^ 0x20 if byte == 0x7D else byte)
    return bytes(plain)


def packet(payload: bytes) -> bytes:
    """A payload as a packet, escaped where it has to be."""
    raw = bytearray()
    for byte in payload:
        if byte in _ESCAPED:
            raw += bytes([0x7D, byte ^ 0x20])
        else:
            raw.append(byte)
    return b"$%s#%02x" % (bytes(raw), sum(raw) & 0xFF)


def number(text: bytes) -> int:
    """A hexadecimal number of the protocol.

    Raises:
        ValueError: it is none.
    """
    if not text or not all(byte in b"0123456789abcdefABCDEF" for byte in text):
        raise ValueError(f"{text!r} is no hexadecimal number")
    return int(text, 16)


def numbers(text: bytes, count: int, separator: bytes = b",") -> list[int]:
    """So many of them.

    Raises:
        ValueError: there are more or fewer, or one of them is none.
    """
    parts = text.split(separator)
    if len(parts) != count:
        raise ValueError(f"{text!r}: {count} numbers are wanted")
    return [number(part) for part in parts]


def unhex(text: bytes) -> bytes:
    """Bytes that are written as pairs of digits.

    Raises:
        ValueError: they are not.
    """
    if any(byte not in b"0123456789abcdefABCDEF" for byte in text):
        raise ValueError(f"{text!r} is not hexadecimal")
    return bytes.fromhex(text.decode("ascii"))
