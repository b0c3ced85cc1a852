"""The input log: everything that a guest was given from outside, exit by exit, as a value.

``m.record()`` makes one, ``m.replay(log)`` gives it to the guest again (:mod:`pykvm.replay`), and
:meth:`InputLog.save` keeps it in a file::

    pykvm-input-log 1 312 8c5e…          version, bytes of JSON, their SHA-256
    { "exits": 17, "memory": [ … ], "regs": "…", "size": 1096, "sha256": … }
    records: struct pykvm_log_record (csrc/seam/replay.h) and what belongs to each

A file is checked whole before any of it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from struct import Struct

from pykvm._abi import ffi, lib
from pykvm.debug.events import NAMES
from pykvm.errors import ReplayError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC = b"pykvm-input-log"
VERSION = 1
MOST_HEADER = 1 << 20
MOST_BYTES = 1 << 30

EXIT: int = lib.PYKVM_LOG_EXIT
REGISTERS: int = lib.PYKVM_LOG_REGISTERS
PAGE: int = lib.PYKVM_LOG_PAGE
MEMORY: int = lib.PYKVM_LOG_MEMORY
IOCTL: int = lib.PYKVM_LOG_IOCTL
COMPLETE: int = lib.PYKVM_LOG_COMPLETE

HEAD = Struct("<HHHBBIIQQ")
"""``struct pykvm_log_record``."""

IOCTLS: dict[str, str] = {
    "KVM_INTERRUPT": "struct kvm_interrupt",
    "KVM_NMI": "",
    "KVM_SET_REGS": "struct kvm_regs",
    "KVM_SET_SREGS": "struct kvm_sregs",
    "KVM_SET_FPU": "struct kvm_fpu",
    "KVM_SET_XCRS": "struct kvm_xcrs",
    "KVM_SET_DEBUGREGS": "struct kvm_debugregs",
    "KVM_SET_VCPU_EVENTS": "struct kvm_vcpu_events",
    "KVM_SET_MP_STATE": "struct kvm_mp_state",
    "KVM_SET_MSRS": "struct kvm_msrs",
}
"""What the host may do to the vCPU meanwhile: the ioctls that a log can hold, by their argument."""
_BY_NUMBER: dict[int, str] = {getattr(lib, name): name for name in IOCTLS}
_SYNC: int = lib.KVM_SYNC_X86_REGS | lib.KVM_SYNC_X86_SREGS | lib.KVM_SYNC_X86_EVENTS
_SYNC_BYTES: int = ffi.sizeof("struct kvm_sync_regs")
_MOST_SHOWN = 16


def padded(length: int) -> int:
    """Bytes that ``length`` bytes take in a log."""
    return (length + 7) & ~7


class Entry:
    """A record: an exit and its answer, or what the host did between two exits.

    Attributes:
        kind: EXIT, REGISTERS, PAGE, MEMORY, IOCTL or COMPLETE.
        number: of an exit: the how manieth, from 1 on.
        reason: of an exit, KVM's name without its prefix: ``io``, ``mmio``, ``hlt``.
        address: port, gpa, MSR; of an ioctl its request number.
        size, count, is_write: of an access, as in :class:`pykvm.debug.events.Event`.
        said: what the guest wrote; what the host wrote.
        answer: what the guest was given for it; of an MSR KVM's structure.
    """

    __slots__ = ("address", "answer", "count", "is_write", "kind", "number", "reason", "said",
                 "size")  # fmt: skip

    def __init__(self, head: tuple[int, ...], said: bytes, answer: bytes) -> None:
        self.kind, reason, self.count, self.size, is_write, _, _, self.address, self.number = head
        self.reason = NAMES.get(reason, f"exit {reason}") if self.kind == EXIT else ""
        self.is_write = bool(is_write)
        self.said = said
        self.answer = answer

    def __repr__(self) -> str:
        if self.kind == EXIT:
            return f"<exit {self.number}: {self.what}>"
        return f"<{self.what}>"

    @property
    def what(self) -> str:
        """In words, without the number."""
        if self.kind == REGISTERS:
            return f"the host set registers ({self.address:#x})"
        if self.kind == PAGE:
            window = ", an interrupt window is wanted" if self.address & 1 else ""
            return f"in the run page CR8 is {self.address >> 8}{window}"
        if self.kind == COMPLETE:
            return "the instruction was completed, and then:"
        if self.kind == MEMORY:
            return f"the host wrote {len(self.said)} bytes at {self.address:#x}: {_hex(self.said)}"
        if self.kind == IOCTL:
            return f"the host did {_BY_NUMBER.get(self.address, hex(self.address))}"
        if self.reason in ("io", "mmio"):
            names = ("out", "in") if self.reason == "io" else ("store", "load")
            text = f"{names[0] if self.is_write else names[1]} {self.address:#x}"
            text += f", {self.size} byte{'' if self.size == 1 else 's'}"
            if self.count > 1:
                text += f" × {self.count}"
            data = self.said or self.answer
            return f"{text}: {_hex(data)}" if data else text
        if self.size or self.reason == "hypercall":
            text = f"{self.reason} {self.address:#x}"
            return f"{text}: {_hex(self.said)}" if self.said else text
        return self.reason


def _hex(data: bytes) -> str:
    return data[:_MOST_SHOWN].hex(" ") + (" …" if len(data) > _MOST_SHOWN else "")


class InputLog:
    """What one vCPU was given from outside. A value, once ``m.record()`` is over.

    ::

        with m.record() as log:
            m.run(timeout=1)
        for entry in log:
            print(entry)

    Attributes:
        memory: the regions of the machine, ``[slot, gpa, size, read-only]`` each.
        regs: KVM's ``struct kvm_regs`` where it begins, as bytes.
        data: the records.
        exits: how many of them are exits.
    """

    def __init__(
        self, memory: list[list[int]], regs: bytes, data: bytes = b"", exits: int = 0
    ) -> None:
        self.memory = memory
        self.regs = regs
        self.data = data
        self.exits = exits

    def __iter__(self) -> Iterator[Entry]:
        at = 0
        while at < len(self.data):
            entry, at = entry_at(self.data, at)
            yield entry

    def __len__(self) -> int:
        return self.exits

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<InputLog: {self.exits} exits, {len(self.data)} bytes>"

    # ---- files ---------------------------------------------------------------------------------

    def __bytes__(self) -> bytes:
        """As in a file."""
        header = {
            "exits": self.exits,
            "memory": self.memory,
            "regs": self.regs.hex(),
            "size": len(self.data),
            "sha256": hashlib.sha256(self.data).hexdigest(),
        }
        text = json.dumps(header, indent=1).encode()
        digest = hashlib.sha256(text).hexdigest().encode()
        return b"%s %d %d %s\n%s\n" % (MAGIC, VERSION, len(text), digest, text) + self.data

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, which is there whole or not at all."""
        from pykvm.snapshot import atomic

        with atomic.Replacing(os.fspath(path)) as fd:
            atomic.write_all(fd, bytes(self), 0)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InputLog:
        """Read a file that :meth:`save` wrote.

        Raises:
            ReplayError: damaged, newer, or not a log: the reason.
        """
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + MOST_HEADER + 1)
        try:
            return parse(content)
        except ReplayError as error:
            raise ReplayError(f"{os.fspath(path)}: {error}") from None


def parse(content: bytes) -> InputLog:
    """The log in a file's content, every record of it checked.

    Raises:
        ReplayError: why it is none.
    """
    line, newline, _ = content[:256].partition(b"\n")
    words = line.split(b" ")
    if words[0] != MAGIC or not newline or len(words) < 2 or not words[1].isdigit():
        raise ReplayError("is no input log of pykvm")
    if words[1] != b"%d" % VERSION:
        raise ReplayError(
            f"has version {words[1].decode()} of the format, and this pykvm reads {VERSION}"
        )
    if len(words) != 4 or not words[2].isdigit() or not 0 < int(words[2]) <= MOST_HEADER:
        raise ReplayError("is damaged: its first line")
    start = len(line) + 1
    text = content[start : start + int(words[2])]
    if hashlib.sha256(text).hexdigest().encode() != words[3]:
        raise ReplayError("is damaged: the header has another checksum, or is cut off")
    if content[start + len(text) : start + len(text) + 1] != b"\n":
        raise ReplayError("is damaged: the header does not end where it should")
    data = content[start + len(text) + 1 :]
    try:
        header = json.loads(text)
        memory = [[int(each) for each in region] for region in header["memory"]]
        log = InputLog(memory, bytes.fromhex(header["regs"]), data, int(header["exits"]))
        size, digest = int(header["size"]), header["sha256"]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ReplayError(f"the header does not make sense: {error!r}") from error
    if len(log.regs) != ffi.sizeof("struct kvm_regs"):
        raise ReplayError("the header does not make sense: other registers")
    if size != len(data) or hashlib.sha256(data).hexdigest() != digest:
        raise ReplayError("is damaged: the records have another checksum, or are cut off")
    check(log)
    return log


def check(log: InputLog) -> None:
    """ReplayError unless every record makes sense."""
    exits, at = 0, 0
    while at < len(log.data):
        entry, end = entry_at(log.data, at)
        problem = _problem(entry)
        if entry.kind == EXIT:
            exits += 1
            if entry.number != exits:
                problem = f"exit {exits} is numbered {entry.number}"
        if problem:
            raise ReplayError(f"is damaged: the record at byte {at}: {problem}")
        at = end
    if exits != log.exits:
        raise ReplayError(f"is damaged: it has {exits} exits, and {log.exits} were recorded")


def entry_at(data: bytes, at: int) -> tuple[Entry, int]:
    """The record at an offset, and where the next one begins.

    Raises:
        ReplayError: it is not all there.
    """
    if len(data) - at < HEAD.size:
        raise ReplayError("is damaged: it ends within a record")
    head = HEAD.unpack_from(data, at)
    said, answered = head[5], head[6]
    at += HEAD.size
    middle = at + padded(said)
    end = middle + padded(answered)
    if end > len(data):
        raise ReplayError("is damaged: it ends within a record")
    return Entry(head, data[at : at + said], data[middle : middle + answered]), end


def _problem(entry: Entry) -> str:
    said = len(entry.said)
    if entry.kind == EXIT:
        if entry.reason in ("io", "mmio"):
            data = entry.said if entry.is_write else entry.answer
            other = entry.answer if entry.is_write else entry.said
            if len(data) != entry.size * entry.count or other or not data:
                return "data of another length than the access"
        return ""
    if entry.answer:
        return "an answer to nothing"
    if entry.kind == REGISTERS and (said != _SYNC_BYTES or entry.address & ~_SYNC):
        return "no registers"
    if entry.kind == PAGE and (said or entry.address & ~0xF01):
        return "nothing of the run page"
    if entry.kind == MEMORY and not said:
        return "no memory"
    if entry.kind == IOCTL and said != _argument(entry):
        return "an ioctl that no log has, or an argument of another size"
    return "" if EXIT <= entry.kind <= COMPLETE else f"kind {entry.kind}"


def _argument(entry: Entry) -> int:
    """Bytes of an ioctl's argument; -1 for one that has no place in a log."""
    name = _BY_NUMBER.get(entry.address)
    if name is None:
        return -1
    if name == "KVM_SET_MSRS":
        return msrs_size(int.from_bytes(entry.said[:4], "little"))
    return ffi.sizeof(IOCTLS[name]) if IOCTLS[name] else 0


def msrs_size(count: int) -> int:
    """Bytes of a ``struct kvm_msrs`` with so many entries."""
    size: int = ffi.sizeof("struct kvm_msrs") + count * ffi.sizeof("struct kvm_msr_entry")
    return size


def ioctl_name(number: int) -> str:
    """The name of an ioctl that a log can hold."""
    return _BY_NUMBER[number]
