"""Traces of exits: what C writes down, what a filter wants, and the files they become."""

from __future__ import annotations

import itertools
import json
import re
import time
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pykvm._abi import lib
from pykvm.cli.main import cli
from pykvm.debug import export
from pykvm.debug.events import NAMES, Event, Filter, Recording
from pykvm.debug.trace import Trace, _Clock
from pykvm.vcpu_thread import NEVER
from tests.support.fake_vcpu import HLT, FakeRun, error, mmio, other, pio

SCRIPT = (pio(0xE9, b"A"), pio(0x60, size=2), mmio(0xD0000000, b"\1\2\3\4"), mmio(0xD0000004), HLT)


def traced(run: FakeRun, *filters: str, **options: Any) -> Trace:
    """The trace of one run of the script's exits, up to its HLT."""
    for port in (0xE9, 0x60):
        run.pio.constant(port, 0x1234 if port == 0x60 else 0, 2)
    run.mmio.constant(0xD0000000, 0x55667788, 8)
    with Trace([run.c], filters, **options) as trace:
        assert run.runner.run(NEVER, None).reason == "halted"
    return trace


def test_an_exit_is_written_down_with_what_it_did_and_what_it_was_answered() -> None:
    trace = traced(FakeRun(*SCRIPT))
    assert [(e.where, e.size, e.data) for e in trace.events] == [
        ("io 0xe9 out", 1, ord("A")),
        ("io 0x60 in", 2, 0x1234),
        ("mmio 0xd0000000 write", 4, 0x04030201),
        ("mmio 0xd0000004 read", 4, 0x55667788),
        ("hlt", 0, None),
    ]
    assert [e.number for e in trace.events] == [1, 2, 3, 4, 5]


def test_times_follow_each_other_and_every_exit_of_a_run_that_ended_is_done() -> None:
    events = traced(FakeRun(*SCRIPT)).events
    assert all(event.spent is not None and event.spent >= 0 for event in events)
    for one, next in pairwise(events):
        assert one.spent is not None
        assert one.time + one.spent + next.inside == pytest.approx(next.time, abs=1e-9)


@pytest.mark.parametrize("stalled", range(4))
def test_a_core_lost_while_the_clocks_are_read_does_not_change_the_rate(
    stalled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = itertools.accumulate(
        (6_000_000 if at == stalled else 1000 for at in itertools.count()), initial=0
    )

    class ThreeTicksANanosecond(_Clock):
        def now(self) -> int:
            return 3 * next(moments)

    fake = SimpleNamespace(clock_gettime_ns=lambda clock: next(moments), CLOCK_MONOTONIC=1)
    monkeypatch.setattr("pykvm.debug.trace.time", fake)
    clock = ThreeTicksANanosecond()
    clock._rate = 0.0  # as where the TSC is good
    assert clock.rate == pytest.approx(1e-9 / 3, rel=1e-3)


def test_a_handler_of_python_is_part_of_the_time_spent() -> None:
    run = FakeRun(pio(0x10, b"x"), HLT)
    took: list[float] = []

    def handler(access: object) -> None:
        began = time.perf_counter()
        while time.perf_counter() < began + 0.002:
            pass
        took.append(time.perf_counter() - began)

    run.pio.handle(0x10, handler)
    with Trace([run.c]) as trace:
        run.runner.run(NEVER, None)
    assert (trace.events[0].spent or 0) >= took[0]


def test_a_string_instruction_is_one_event() -> None:
    run = FakeRun(pio(0xE9, b"abcdefghijkl"), HLT)
    run.pio.ignore(0xE9)
    with Trace([run.c]) as trace:
        run.runner.run(NEVER, None)
    event = trace.events[0]
    assert (event.count, event.size) == (12, 1)
    assert event.data == int.from_bytes(b"abcdefgh", "little")


def test_a_failed_entry_is_no_exit() -> None:
    run = FakeRun(error(11), HLT)  # EAGAIN: the loop tries again
    with Trace([run.c]) as trace:
        run.runner.run(NEVER, None)
    assert [event.where for event in trace.events] == ["hlt"]


def test_nothing_is_written_once_it_is_off() -> None:
    run = FakeRun(*SCRIPT)
    trace = traced(run)
    run.runner.run(NEVER, None)
    assert len(trace.events) == 5
    assert not run.c.events


def test_two_traces_at_once_are_refused() -> None:
    run = FakeRun(HLT)
    with Trace([run.c]), pytest.raises(ValueError, match="traced already"):
        Trace([run.c]).begin()


@pytest.mark.parametrize("last", [1, 2, 4, 8])
def test_of_many_exits_the_last_are_kept_and_the_others_counted(last: int) -> None:
    run = FakeRun(*(pio(0xE9, bytes([n])) for n in range(20)), HLT)
    run.pio.ignore(0xE9)
    with Trace([run.c], last=last) as trace:
        run.runner.run(NEVER, None)
    kept = trace.events
    assert len(kept) == last and trace.lost == 21 - last
    assert [event.number for event in kept] == list(range(22 - last, 22))


# ---- filters -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        (["io"], [1, 2]),
        (["mmio"], [3, 4]),
        (["hlt"], [5]),
        (["any"], [1, 2, 3, 4, 5]),
        (["io:0xe9"], [1]),
        (["io:0x60-0xe8"], [2]),
        (["io:0x60-0xe9:w"], [1]),
        (["any:w"], [1, 3]),
        (["any:r"], [2, 4, 5]),
        (["mmio:0xd0000001-0xd0000004", "hlt"], [4, 5]),
        (["io:0x61"], []),
    ],
)
def test_filters_are_matched_in_c(filters: list[str], wanted: list[int]) -> None:
    trace = traced(FakeRun(*SCRIPT), *filters)
    assert [event.number for event in trace.events] == wanted
    assert trace.passed == 5 - len(wanted)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing",
        "io:",
        "io:x",
        "io:5-4",
        "io:1:2",
        "io:-1",
        "io:1:rw",
        "io:0x10000000000000000",
    ],
)
def test_a_filter_that_makes_no_sense_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        Filter(text)


def test_msr_exits_and_hypercalls_have_their_number_as_address() -> None:
    run = FakeRun(other(lib.KVM_EXIT_X86_WRMSR))
    run.vcpu.kvm_run.msr.index, run.vcpu.kvm_run.msr.data = 0xC0000080, 0x500
    with Trace([run.c]) as trace:
        run.runner.run(NEVER, None)
    (event,) = trace.events
    assert (event.where, event.data) == ("x86_wrmsr 0xc0000080 write", 0x500)


def test_an_exit_that_is_newer_than_pykvm_is_named_by_its_number() -> None:
    run = FakeRun(other(63))
    with Trace([run.c]) as trace:
        run.runner.run(NEVER, None)
    assert trace.events[0].where == "exit 63"


# ---- files ---------------------------------------------------------------------------------------

U64 = st.integers(0, (1 << 64) - 1)
TIMES = st.floats(0, 1e6, allow_nan=False)
EVENTS = st.builds(
    Event,
    TIMES,
    st.integers(0, 287),
    st.sampled_from(sorted(NAMES.values())),
    address=st.none() | U64,
    size=st.integers(0, 8),
    count=st.integers(1, 4096),
    is_write=st.booleans(),
    data=st.none() | U64,
    rip=st.none() | U64,
    inside=TIMES,
    spent=st.none() | TIMES,
    number=st.integers(0, (1 << 32) - 1),
)
RECORDINGS = st.builds(
    Recording, st.lists(EVENTS, max_size=20), st.integers(0, 1 << 40), st.just({"vm": {"a": 1}})
)


@given(RECORDINGS)
def test_a_trace_comes_back_from_lines_as_it_was(recording: Recording) -> None:
    lines = list(export.to_lines(recording))
    assert all("\n" not in line for line in lines)
    events = [export._event(json.loads(line)) for line in lines[1:]]
    assert Recording(events).events == recording.events


@given(RECORDINGS)
def test_chromes_format_has_its_schema_and_comes_back_as_it_was(recording: Recording) -> None:
    trace = json.loads(json.dumps(export.to_chrome(recording)))
    check_chrome(trace)
    back = export.from_chrome(trace)
    assert back.events == recording.events
    assert (back.lost, back.stats) == (recording.lost, recording.stats)


def check_chrome(trace: Any) -> None:
    """The schema of Google's "Trace Event Format", as far as slices and metadata go."""
    assert set(trace) <= {"traceEvents", "displayTimeUnit", "otherData", "metadata"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    for entry in trace["traceEvents"]:
        assert type(entry["pid"]) is int and type(entry["tid"]) is int
        assert type(entry["name"]) is str
        assert entry["ph"] in ("X", "M")
        if entry["ph"] == "M":
            assert entry["name"] in ("process_name", "thread_name")
            assert set(entry["args"]) == {"name"}
            continue
        assert type(entry["ts"]) in (int, float)
        assert type(entry["dur"]) in (int, float) and entry["dur"] >= 0
        assert all(part for part in entry["cat"].split(","))
        assert isinstance(entry.get("args", {}), dict)


@pytest.mark.parametrize("name", ["t.json", "t.jsonl", "t"])
def test_saved_traces_are_read_back(tmp_path: Path, name: str) -> None:
    trace = traced(FakeRun(*SCRIPT))
    trace.save(tmp_path / name)
    assert export.load(tmp_path / name).events == trace.events
    is_chrome = (tmp_path / name).read_text().startswith('{"traceEvents"')
    assert is_chrome == name.endswith(".json")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is no trace"),
        ("hello", "is no trace"),
        ("[]", "no pykvm_trace"),
        ('{"pykvm_trace": 2}', "version 2"),
        ('{"pykvm_trace": 1}\n{"cpu": 0}', "line 2 is no event"),
        ('{"pykvm_trace": 1}\n{"time": 0, "cpu": -1, "reason": "io"}', "line 2.*cpu is -1"),
        ('{"pykvm_trace": 1}\n{"time": 0, "cpu": 0, "reason": "io", "size": "1"}', "size is '1'"),
        ('{"pykvm_trace": 1}\n{"time": NaN, "cpu": 0, "reason": "io"}', "time is nan"),
        ('{"pykvm_trace": 1}\n{"time": 1, "cpu": 0, "reason": "io", "spent": 1e300}', "spent is"),
        ('{"pykvm_trace": 1}\n[1]', "line 2 is no event"),
        ('{"pykvm_trace": 1, "stats": {"vm": {"exits": "many"}}}', "is no trace: its lost or its"),
        ('{"pykvm_trace": 1, "lost": []}', "is no trace: its lost or its"),
        ("[" * 100_000, "is no trace"),
        ("\udcff", "is no trace: 'utf-8'"),
        ('{"traceEvents": []}', "not written by pykvm"),
        ('{"traceEvents": [], "otherData": 1}', "not written by pykvm"),
        ('{"traceEvents": 5, "otherData": {"pykvm_trace": 1}}', "no list"),
        ('{"traceEvents": [5], "otherData": {"pykvm_trace": 1}}', "entry 0 is no event"),
    ],
)
def test_what_is_no_trace_is_refused_with_the_reason(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = tmp_path / "bad"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=complaint):
        export.load(path)
    done = CliRunner().invoke(cli, ["trace", "summary", str(path)])
    assert done.exit_code == 1 and "pykvm:" in done.output


# ---- summaries and pictures ----------------------------------------------------------------------


def recording() -> Recording:
    events = [
        Event(n * 1e-4, n % 2, "io", address=0x3F8, size=1, is_write=True, data=n,
              inside=5e-5, spent=n * 1e-6)
        for n in range(30)
    ]  # fmt: skip
    events += [Event(0.01 + n * 1e-4, 0, "hlt", spent=1e-3) for n in range(2)]
    return Recording(events, lost=7, stats={"vm": {}, "cpu 0": {"exits": 32}})


def test_a_summary_counts_by_exit_and_finds_the_slowest() -> None:
    summary = recording().summary()
    assert [(row.where, row.count) for row in summary.rows] == [("io 0x3f8 out", 30), ("hlt", 2)]
    assert summary.rows[0].spent == pytest.approx(sum(range(30)) * 1e-6)
    assert [event.reason for event in summary.slowest[:3]] == ["hlt", "hlt", "io"]
    text = str(summary)
    assert "32 exits" in text and "7 before them lost" in text and "exits" in text
    assert "93.8 %" in text


def test_a_summary_of_nothing_is_a_summary() -> None:
    summary = Recording([]).summary()
    assert "0 exits" in str(summary)
    ElementTree.fromstring(summary._repr_svg_())


def test_the_timeline_is_svg_of_bounded_size_with_a_lane_for_each_cpu() -> None:
    events = [Event(n * 1e-5, n % 3, "io<&>\x01", spent=1e-6) for n in range(20_000)]
    svg = Recording(events).summary()._repr_svg_()
    assert len(svg) < 500_000
    texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.text]
    assert {"vcpu 0", "vcpu 1", "vcpu 2", "io<&>·"} <= set(texts)


def test_a_notebook_gets_html_with_the_picture_in_it() -> None:
    html = recording()._repr_html_()
    assert html.count("<svg") == 1 and "io 0x3f8 out" in html


def test_the_command_prints_draws_and_gives_json(tmp_path: Path) -> None:
    file, picture = tmp_path / "t.jsonl", tmp_path / "t.svg"
    recording().save(file)
    done = CliRunner().invoke(cli, ["trace", "summary", str(file), "--svg", str(picture)])
    assert done.exit_code == 0, done.output
    assert "io 0x3f8 out" in done.output
    ElementTree.parse(picture)
    done = CliRunner().invoke(cli, ["trace", "summary", str(file), "--json"])
    assert json.loads(done.output)["rows"][0]["count"] == 30
