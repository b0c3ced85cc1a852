"""The part of AML that a machine without devices to configure needs (ACPI 6.5, chapters 6.4, 20.2).

Every function gives the bytes of one term, so a definition block is written as it reads::

    scope("\\\\_SB", device("COM1", name("_HID", eisa_id("PNP0501")), …))

:func:`disassemble` shows such bytes again; for any others there is ``iasl -d``.
"""

from __future__ import annotations

from struct import error as StructError
from struct import pack, unpack_from

NAME, SCOPE, BUFFER, PACKAGE, METHOD, RETURN = 0x08, 0x10, 0x11, 0x12, 0x14, 0xA4
NOTIFY = 0x86
EXTENDED, DEVICE = 0x5B, 0x82
STRING, BYTE, WORD, DWORD, QWORD = 0x0D, 0x0A, 0x0B, 0x0C, 0x0E
ZERO, ONE, ONES = 0x00, 0x01, 0xFF
ROOT, PARENT, DUAL, MULTI = 0x5C, 0x5E, 0x2E, 0x2F

_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
_FIXED = {BYTE: "<B", WORD: "<H", DWORD: "<I", QWORD: "<Q"}

# ---- terms ---------------------------------------------------------------------------------------


def _length(content: bytes) -> bytes:
    """Put a PkgLength, which counts itself, before a package's content (20.2.4)."""
    for size in (1, 2, 3, 4):
        total = len(content) + size
        if size == 1 and total < 1 << 6:
            return bytes([total]) + content
        if size > 1 and total < 1 << (4 + 8 * (size - 1)):
            head = (size - 1) << 6 | total & 0xF
            return bytes([head]) + (total >> 4).to_bytes(size - 1, "little") + content
    raise ValueError(f"a package of {len(content)} bytes is too long for AML")


def path(text: str) -> bytes:
    """Encode a name: ``"COM1"``, ``"\\\\_SB.COM1"``, ``"^FOO"``; short ones are filled up."""
    rest = text.lstrip("\\^")
    prefix = text[: len(text) - len(rest)].encode("ascii")
    segments = rest.split(".") if rest else []
    for segment in segments:
        if not 1 <= len(segment) <= 4 or set(segment) - _LETTERS or segment[0].isdigit():
            raise ValueError(f"{segment!r} is no ACPI name: up to 4 of A-Z, 0-9, _; no digit first")
    segments = [segment.ljust(4, "_") for segment in segments]
    joined = "".join(segments).encode("ascii")
    if len(segments) == 0:
        return prefix + b"\0"
    if len(segments) == 1:
        return prefix + joined
    if len(segments) == 2:
        return prefix + bytes([DUAL]) + joined
    return prefix + bytes([MULTI, len(segments)]) + joined


def integer(value: int) -> bytes:
    """Encode an unsigned number of up to 64 bits, as short as it goes."""
    if value in (ZERO, ONE):
        return bytes([value])
    for code, form in _FIXED.items():
        if 0 <= value < 1 << 8 * len(pack(form, 0)):
            return bytes([code]) + pack(form, value)
    raise ValueError(f"{value:#x} does not fit 64 bits")


def string(text: str) -> bytes:
    """Encode an ASCII string."""
    if "\0" in text:
        raise ValueError("a string in AML ends at its first zero")
    return bytes([STRING]) + text.encode("ascii") + b"\0"


def buffer(data: bytes) -> bytes:
    """Encode a buffer of bytes."""
    return bytes([BUFFER]) + _length(integer(len(data)) + data)


def package(*elements: bytes) -> bytes:
    """Encode a package of up to 255 terms."""
    return bytes([PACKAGE]) + _length(bytes([len(elements)]) + b"".join(elements))


def name(text: str, value: bytes) -> bytes:
    """Encode ``Name(text, value)``."""
    return bytes([NAME]) + path(text) + value


def scope(text: str, *terms: bytes) -> bytes:
    """Encode ``Scope(text) {terms}``."""
    return bytes([SCOPE]) + _length(path(text) + b"".join(terms))


def device(text: str, *terms: bytes) -> bytes:
    """Encode ``Device(text) {terms}``."""
    return bytes([EXTENDED, DEVICE]) + _length(path(text) + b"".join(terms))


def method(text: str, *terms: bytes, arguments: int = 0, serialized: bool = False) -> bytes:
    """Encode ``Method(text, arguments) {terms}``."""
    flags = bytes([arguments | serialized << 3])
    return bytes([METHOD]) + _length(path(text) + flags + b"".join(terms))


def return_(value: bytes) -> bytes:
    """Encode ``Return(value)``."""
    return bytes([RETURN]) + value


def notify(text: str, value: int) -> bytes:
    """Encode ``Notify(text, value)``: tell a device's driver of an event."""
    return bytes([NOTIFY]) + path(text) + integer(value)


def eisa_id(text: str) -> bytes:
    """Encode a plug-and-play id of three letters and four hex digits, ``"PNP0501"`` (19.3.4)."""
    letters, digits = text[:3], text[3:]
    if len(text) != 7 or not letters.isalpha() or not letters.isupper():
        raise ValueError(f"{text!r} is no EISA id: three letters and four hex digits")
    code = 0
    for letter in letters:
        code = code << 5 | ord(letter) - 0x40
    return bytes([DWORD]) + pack(">HH", code, int(digits, 16))


# ---- resources (6.4) -----------------------------------------------------------------------------


def resources(*descriptors: bytes) -> bytes:
    """Encode ``ResourceTemplate() {descriptors}``. The end tag's checksum of 0 means: not used."""
    return buffer(b"".join(descriptors) + b"\x79\0")


def io(first: int, length: int) -> bytes:
    """Encode a range of I/O ports that does not move (6.4.2.5)."""
    return pack("<BBHHBB", 0x47, 1, first, first, 1, length)


def irq(number: int) -> bytes:
    """Encode an ISA interrupt: edge-triggered, active high (6.4.2.1)."""
    return pack("<BH", 0x22, 1 << number)


def memory32(base: int, length: int) -> bytes:
    """Encode a range of writable memory below 4 GiB that does not move (6.4.3.4)."""
    return pack("<BHBII", 0x86, 9, 1, base, length)


def interrupt(gsi: int, *, edge: bool) -> bytes:
    """Encode an interrupt that the device makes: active high, its own (6.4.3.6)."""
    return pack("<BHBBI", 0x89, 6, 1 | edge << 1, 1, gsi)


BUS_SPACE, IO_SPACE, MEMORY_SPACE = 2, 1, 0
_PASSES_ON = 0x0C
"""A bridge hands the range on to what is behind it, and neither end of it moves (6.4.3.5.1)."""


def window(space: int, first: int, last: int) -> bytes:
    """Encode a range of buses, ports or memory that a bridge hands on (6.4.3.5)."""
    special = {BUS_SPACE: 0, IO_SPACE: 3, MEMORY_SPACE: 1}[space]  # all ports; writable
    length = last - first + 1
    if space == MEMORY_SPACE:
        return pack("<BHBBBIIIII", 0x87, 23, space, _PASSES_ON, special, 0, first, last, 0, length)
    return pack("<BHBBBHHHHH", 0x88, 13, space, _PASSES_ON, special, 0, first, last, 0, length)


# ---- the way back --------------------------------------------------------------------------------

_DEEPEST = 16


def disassemble(code: bytes) -> str:
    """Show terms as ASL, one a line, as far as they are of the kinds above.

    Raises:
        ValueError: something else, or nothing whole.
    """
    lines: list[str] = []
    try:
        _terms(code, 0, len(code), 0, lines)
    except (IndexError, StructError) as error:
        raise ValueError(f"the AML is cut off: {error}") from None
    return "\n".join(lines)


def _terms(code: bytes, at: int, end: int, depth: int, lines: list[str]) -> None:
    if depth > _DEEPEST:
        raise ValueError(f"the terms are nested more than {_DEEPEST} deep")
    indent = "    " * depth
    while at < end:
        kind = code[at]
        if kind == NAME:
            text, at = _path(code, at + 1)
            shown, at = _data(code, at)
            lines.append(f"{indent}Name ({text}, {shown})")
            continue
        if kind == RETURN:
            shown, at = _data(code, at + 1)
            lines.append(f"{indent}Return ({shown})")
            continue
        if kind == NOTIFY:
            text, at = _path(code, at + 1)
            shown, at = _data(code, at)
            lines.append(f"{indent}Notify ({text}, {shown})")
            continue
        wide = kind == EXTENDED
        word = {SCOPE: "Scope", METHOD: "Method", EXTENDED: "Device"}.get(kind)
        if word is None or (wide and code[at + 1] != DEVICE):
            raise ValueError(f"opcode {kind:#04x} at offset {at} is not of the part known here")
        stop, inner = _package(code, at + 1 + wide)
        if stop > end:
            raise ValueError(f"the {word} at offset {at} ends beyond what it is part of")
        text, inner = _path(code, inner)
        if kind == METHOD:
            text += f", {code[inner] & 7}"
            inner += 1
        lines.append(f"{indent}{word} ({text})")
        _terms(code, inner, stop, depth + 1, lines)
        at = stop
    if at != end:
        raise ValueError(f"a term runs over the end, at offset {end}, of what it is part of")


def _package(code: bytes, at: int) -> tuple[int, int]:
    """Read a PkgLength: where its package ends, and where its content begins."""
    more = code[at] >> 6
    total = code[at] & (0xF if more else 0x3F)
    total |= int.from_bytes(code[at + 1 : at + 1 + more], "little") << 4
    return at + total, at + 1 + more


def _path(code: bytes, at: int) -> tuple[str, int]:
    text = ""
    while code[at] in (ROOT, PARENT):
        text += chr(code[at])
        at += 1
    count = 1
    if code[at] == 0:
        return text, at + 1
    if code[at] == DUAL:
        count, at = 2, at + 1
    elif code[at] == MULTI:
        count, at = code[at + 1], at + 2
    names = [code[at + 4 * i : at + 4 * i + 4].decode("ascii") for i in range(count)]
    return text + ".".join(names), at + 4 * count


def _data(code: bytes, at: int, depth: int = 0) -> tuple[str, int]:
    kind = code[at]
    if kind in (ZERO, ONE):
        return ("Zero", "One")[kind], at + 1
    if kind == ONES:
        return "Ones", at + 1
    if kind in _FIXED:
        value = unpack_from(_FIXED[kind], code, at + 1)[0]
        text = _eisa_text(value) if kind == DWORD else ""
        return text or f"{value:#x}", at + 1 + len(pack(_FIXED[kind], 0))
    if kind == STRING:
        end = code.index(0, at)
        return f'"{code[at + 1 : end].decode("ascii")}"', end + 1
    if kind == PACKAGE:
        stop, inner = _package(code, at + 1)
        shown: list[str] = []
        inner += 1
        while inner < stop:
            if depth == _DEEPEST:
                raise ValueError(f"packages are nested more than {_DEEPEST} deep")
            text, inner = _data(code, inner, depth + 1)
            shown.append(text)
        if inner != stop:
            raise ValueError(f"an element runs over the end, at offset {stop}, of its package")
        return f"Package () {{{', '.join(shown)}}}", stop
    if kind == BUFFER:
        stop, inner = _package(code, at + 1)
        _, inner = _data(code, inner, _DEEPEST)
        if not inner <= stop <= len(code):
            raise ValueError(f"the buffer at offset {at} is cut off")
        return _resources_text(code[inner:stop]), stop
    raise ValueError(f"opcode {kind:#04x} at offset {at} is not of the part known here")


def _eisa_text(value: int) -> str:
    """Show a number as the EISA id that it could be, or ""."""
    code, digits = unpack_from(">HH", pack("<I", value))
    letters = [(code >> shift & 0x1F) + 0x40 for shift in (10, 5, 0)]
    if code >> 15 or not all(0x41 <= letter <= 0x5A for letter in letters):
        return ""
    return f'EisaId ("{bytes(letters).decode()}{digits:04X}")'


def _resources_text(data: bytes) -> str:
    """Show a buffer as the resources that it could hold, or as bytes."""
    shown: list[str] = []
    at = 0
    while at < len(data):
        rest = data[at:]
        if rest == b"\x79\0":
            return f"ResourceTemplate () {{{', '.join(shown)}}}"
        if rest[0] == 0x47 and len(rest) > 8:
            _, _, first, _, _, length = unpack_from("<BBHHBB", rest)
            shown.append(f"IO ({first:#x}, {length})")
            at += 8
        elif rest[0] == 0x22 and len(rest) > 3:
            mask = unpack_from("<H", rest, 1)[0]
            shown.append(f"IRQ ({mask.bit_length() - 1})")
            at += 3
        elif rest[0] == 0x86 and len(rest) > 12:
            _, _, _, base, length = unpack_from("<BHBII", rest)
            shown.append(f"Memory32Fixed ({base:#x}, {length:#x})")
            at += 12
        elif rest[0] == 0x89 and len(rest) > 9:
            _, _, flags, _, gsi = unpack_from("<BHBBI", rest)
            shown.append(f"Interrupt ({gsi}, {'Edge' if flags & 2 else 'Level'})")
            at += 9
        elif rest[0] in (0x87, 0x88) and len(rest) > 3 + rest[1]:
            form = "<BHBBBIIIII" if rest[0] == 0x87 else "<BHBBBHHHHH"
            _, _, space, _, _, _, first, last, _, _ = unpack_from(form, rest)
            kind = {0: "Memory", 1: "IO", 2: "BusNumber"}.get(space, "Space")
            shown.append(f"{'DWord' if rest[0] == 0x87 else 'Word'}{kind} ({first:#x}, {last:#x})")
            at += 3 + rest[1]
        else:
            break
    return f"Buffer () {{{data.hex(' ')}}}"
