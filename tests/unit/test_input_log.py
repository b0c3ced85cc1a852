"""Input logs: files that are whole or refused, and the C part that writes and follows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pykvm import result as reasons
from pykvm._abi import ffi, lib
from pykvm.debug import input_log as logs
from pykvm.debug.input_log import HEAD, InputLog, padded, parse
from pykvm.errors import ReplayError
from pykvm.vcpu_thread import NEVER, End
from tests.support.fake_vcpu import HLT, FakeRun, mmio, pio

pytestmark = pytest.mark.sanitize

IO, MMIO = lib.KVM_EXIT_IO, lib.KVM_EXIT_MMIO
REGS = bytes(range(144))
MEMORY = [[0, 0, 0x40000, 0]]


def record(
    kind: int, *, reason: int = 0, count: int = 0, size: int = 0, is_write: int = 0,
    said: bytes = b"", answer: bytes = b"", address: int = 0, number: int = 0,
) -> bytes:  # fmt: skip
    head = HEAD.pack(kind, reason, count, size, is_write, len(said), len(answer), address, number)
    return head + said.ljust(padded(len(said)), b"\0") + answer.ljust(padded(len(answer)), b"\0")


@st.composite
def access(draw: st.DrawFn) -> dict[str, Any]:
    is_io = draw(st.booleans())
    size = draw(st.sampled_from((1, 2, 4))) if is_io else draw(st.integers(1, 8))
    count = draw(st.integers(1, 20)) if is_io else 1
    data = draw(st.binary(min_size=size * count, max_size=size * count))
    is_write = draw(st.booleans())
    return {
        "kind": logs.EXIT, "reason": lib.KVM_EXIT_IO if is_io else lib.KVM_EXIT_MMIO,
        "size": size, "count": count, "is_write": is_write, "said" if is_write else "answer": data,
        "address": draw(st.integers(0, 0xFFFF)),
    }  # fmt: skip


HOST = st.one_of(
    st.builds(
        lambda at, data: {"kind": logs.MEMORY, "address": at, "said": data},
        st.integers(0, 1 << 40),
        st.binary(min_size=1, max_size=40),
    ),
    st.just({"kind": logs.COMPLETE}),
    st.builds(lambda on: {"kind": logs.PAGE, "address": on}, st.sampled_from((0, 1, 0x300))),
    st.builds(
        lambda irq: {
            "kind": logs.IOCTL,
            "address": lib.KVM_INTERRUPT,
            "said": bytes((irq, 0, 0, 0)),
        },
        st.integers(0, 255),
    ),
    st.just(
        {"kind": logs.REGISTERS, "address": 1, "said": bytes(ffi.sizeof("struct kvm_sync_regs"))}
    ),
)


@st.composite
def whole(draw: st.DrawFn) -> InputLog:
    data, exits = b"", 0
    for each in draw(st.lists(st.one_of(access(), HOST), max_size=12)):
        if each["kind"] == logs.EXIT:
            exits += 1
            each = {**each, "number": exits}
        data += record(**each)
    return InputLog(MEMORY, REGS, data, exits)


@given(whole())
def test_a_log_is_read_as_it_was_written(log: InputLog) -> None:
    again = parse(bytes(log))
    assert (again.memory, again.regs, again.data, again.exits) == (
        log.memory, log.regs, log.data, log.exits,
    )  # fmt: skip
    assert [repr(entry) for entry in again] == [repr(entry) for entry in log]
    assert b"".join(
        record(
            e.kind, reason=IO if e.reason == "io" else MMIO * bool(e.reason),
            count=e.count, size=e.size, is_write=e.is_write, said=e.said, answer=e.answer,
            address=e.address, number=e.number,
        )
        for e in again
    ) == log.data  # fmt: skip


@given(whole(), st.data())
def test_every_damaged_byte_and_every_missing_end_is_found(
    log: InputLog, data: st.DataObject
) -> None:
    content = bytearray(bytes(log))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ReplayError):
        parse(bytes(content))
    with pytest.raises(ReplayError):
        parse(bytes(log)[:at])


@given(st.binary(max_size=300))
@example(logs.MAGIC + b" 2 4 abcd\n1234")
def test_anything_else_is_refused(content: bytes) -> None:
    with pytest.raises(ReplayError):
        parse(content)


@given(whole(), st.data())
def test_records_that_make_no_sense_are_refused_though_their_checksums_are_right(
    log: InputLog, data: st.DataObject
) -> None:
    raw = bytearray(log.data or bytes(32))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        again = parse(bytes(InputLog(MEMORY, REGS, bytes(raw), log.exits)))
    except ReplayError:
        return
    assert sum(entry.kind == logs.EXIT for entry in again) == again.exits == len(again)
    assert "exit" in repr(list(again)) or not again.exits


NONSENSE = {
    "kind 9": record(9),
    "numbered 2": record(logs.EXIT, reason=lib.KVM_EXIT_HLT, number=2),
    "another length": record(
        logs.EXIT, reason=lib.KVM_EXIT_IO, size=2, count=1, answer=b"a", number=1
    ),
    "no registers": record(logs.REGISTERS, address=8, said=bytes(8)),
    "nothing of the run page": record(logs.PAGE, address=2),
    "no memory": record(logs.MEMORY),
    "an ioctl": record(logs.IOCTL, address=lib.KVM_SET_SREGS, said=b"short"),
    "answer to nothing": record(logs.MEMORY, said=b"a", answer=b"b"),
    "0 exits, and 1": b"",
}


@pytest.mark.parametrize("why", NONSENSE)
def test_the_reason_is_said(why: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    InputLog(MEMORY, REGS, NONSENSE[why], 1).save(path)
    with pytest.raises(ReplayError, match=f"{path}: .*{why}"):
        InputLog.load(path)


def test_a_newer_format_is_refused() -> None:
    content = bytes(InputLog(MEMORY, REGS)).replace(b"pykvm-input-log 1", b"pykvm-input-log 2", 1)
    with pytest.raises(ReplayError, match=r"version 2 .* reads 1"):
        parse(content)


# ---- the C part --------------------------------------------------------------------------------


class Log:
    """Stands in for who records or replays; what C leaves to Python ends the run."""

    def __init__(self, fake: FakeRun, mode: int, data: bytes = b"", room: int = 1 << 16) -> None:
        self.bytes = ffi.new("uint8_t[]", max(room, len(data), 1))
        ffi.memmove(self.bytes, data, len(data))
        self.c = ffi.new("struct pykvm_log *", {"mode": mode, "bytes": self.bytes})
        self.c.capacity, self.c.end = max(room, len(data)), len(data)
        fake.runner.log, fake.c.log = self, self.c

    def see(self, outcome: int) -> End:
        return End(
            {lib.PYKVM_REPLAYED: "replayed", lib.PYKVM_DIVERGED: "diverged"}.get(outcome, "seen")
        )

    @property
    def data(self) -> bytes:
        return bytes(ffi.buffer(self.bytes, self.c.end))


SCRIPT = (
    pio(0x40, size=2), pio(0x41, b"\1\2\3\4", size=2), mmio(0x1000, size=8), mmio(0x1008, b"abc"),
    pio(0x42, size=4, count=4), HLT,
)  # fmt: skip


def recorded() -> bytes:
    fake = FakeRun(*SCRIPT)
    answers = iter(range(1, 100))
    fake.pio.handle(0x40, lambda access: next(answers), 8)
    fake.mmio.handle(0x1000, lambda access: next(answers) << 32, 16)
    log = Log(fake, lib.PYKVM_LOG_RECORD)
    assert fake.runner.run(NEVER, None).reason == reasons.HALTED
    return log.data


def test_what_was_recorded_is_answered_without_a_handler() -> None:
    data = recorded()
    entries = list(InputLog(MEMORY, REGS, data, 6))
    assert [entry.number for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert repr(entries[1]) == "<exit 2: out 0x41, 2 bytes × 2: 01 02 03 04>"
    assert entries[2].answer == (4 << 32).to_bytes(8, "little")
    fake = FakeRun(*SCRIPT)
    Log(fake, lib.PYKVM_LOG_REPLAY, data)
    assert fake.runner.run(NEVER, None).reason == "replayed"
    assert fake.answered(0, 2) == b"\1\0" and fake.answered(2, 8) == entries[2].answer
    assert fake.answered(4, 16) == entries[4].answer
    assert fake.c.exits == 6


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_log_makes_c_look_beyond_it(data: st.DataObject) -> None:
    """Whatever the bytes: C is given what parse() would refuse."""
    raw = bytearray(recorded())
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    fake = FakeRun(*SCRIPT)
    log = Log(fake, lib.PYKVM_LOG_REPLAY, bytes(raw), room=0)
    assert fake.runner.run(NEVER, 50).reason in ("replayed", "diverged", "seen")
    assert log.c.at <= log.c.end


def test_a_log_without_room_is_pythons_before_the_guest_is_entered() -> None:
    fake = FakeRun(*SCRIPT)
    Log(fake, lib.PYKVM_LOG_RECORD, room=lib.PYKVM_LOG_ROOM - 1)
    assert fake.runner.run(NEVER, None).reason == "seen"
    assert fake.c.entries == 0
