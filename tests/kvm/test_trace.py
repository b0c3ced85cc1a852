"""A trace of real exits: every one of them, in order, with registers where they were asked for."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

import pykvm
from pykvm.cli.main import cli
from pykvm.debug import export
from tests.support import tiny_kernel

ENTRY = 0x8000


def machine(code: str, **options: object) -> pykvm.Machine:
    m = pykvm.Machine(**options)  # type: ignore[arg-type]
    m.load(pykvm.asm(code, mode="long64"), at=ENTRY)
    m.cpu.enter("long64", entry=ENTRY)
    return m


def test_every_exit_is_there_with_its_value() -> None:
    with machine("mov ecx, 5; l: mov al, cl; out 0xe9, al; in al, 0x60; loop l; hlt") as m:
        m.pio.ignore(0xE9)
        m.pio.constant(0x60, 0x42)
        with m.trace() as trace:
            result = m.run(timeout=5)
        assert result.reason == "halted"
        assert len(trace.events) == result.exits == 11
        assert [e.data for e in trace.events if e.is_write] == [5, 4, 3, 2, 1]
        assert {e.data for e in trace.events if e.where == "io 0x60 in"} == {0x42}
        assert all(e.rip is None for e in trace.events)
        assert sum(e.inside + (e.spent or 0) for e in trace.events) <= result.seconds


def test_with_rip_every_event_says_where() -> None:
    with machine("mov eax, 7; out 0xe9, al; in al, 0x60; hlt") as m:
        m.pio.ignore(0xE9)
        m.pio.constant(0x60, 0)
        with m.trace(rip=True) as trace:
            m.run(timeout=5)
    out, read, hlt = trace.events
    assert out.rip in (ENTRY + 5, ENTRY + 7)  # KVM completes an OUT at once or on re-entry
    assert (read.rip, hlt.rip) == (ENTRY + 7, ENTRY + 10)


def test_registers_read_in_a_handler_are_right_under_a_trace_with_rip() -> None:
    with machine("mov ebx, 1; l: out 0xe9, al; inc ebx; cmp ebx, 4; jne l; hlt") as m:
        seen: list[int] = []
        m.on_pio(0xE9, lambda access: seen.append(m.cpu.rbx))
        with m.trace(rip=True):
            m.run(timeout=5)
        assert seen == [1, 2, 3] and m.cpu.rbx == 4


def test_each_vcpu_has_its_events() -> None:
    with machine("out 0xe9, al; hlt", cpus=2) as m:
        m.cpus[1].enter("long64", entry=ENTRY, stack=0x7800)
        m.pio.ignore(0xE9)
        with m.trace() as trace:
            m.run(timeout=5)
    assert sorted((e.cpu, e.where) for e in trace.events) == [
        (cpu, where) for cpu in (0, 1) for where in ("hlt", "io 0xe9 out")
    ]


def test_a_trace_is_begun_read_and_ended_while_the_guest_runs() -> None:
    with machine("l: out 0xe9, al; jmp l") as m:
        came = threading.Event()
        m.on_pio(0xE9, lambda access: came.set())
        with m.start(timeout=30) as running:
            assert came.wait(10)
            for _ in range(5):
                with m.trace(last=64) as trace:
                    while trace.lost < 100:  # each exit waits for this thread's GIL
                        assert m.running, "the run's time was over"
                        numbers = [event.number for event in trace.events]
                        assert (
                            numbers == list(range(numbers[0], numbers[0] + len(numbers)))
                            if numbers
                            else True
                        )
            running.stop()


def test_kvms_own_statistics_are_beside_it(require_cap: object) -> None:
    with machine("out 0xe9, al; out 0xe9, al; hlt") as m:
        if not m.vm.check_extension("KVM_CAP_BINARY_STATS_FD"):
            pytest.skip("KVM_CHECK_EXTENSION(KVM_CAP_BINARY_STATS_FD) = 0")
        m.pio.ignore(0xE9)
        with m.trace() as trace:
            m.run(timeout=5)
        assert trace.stats["cpu 0"]["exits"] >= 3
        assert "vm" in trace.stats


def command(*words: str) -> int:
    """The command in this process: another takes seconds in the rig."""
    with pytest.raises(SystemExit) as end:
        cli.main(list(words), prog_name="pykvm")
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize("name", ["t.json", "t.jsonl"])
def test_the_command_line_writes_one_and_tells_what_is_in_it(
    tmp_path: Path, name: str, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    file = tmp_path / name
    assert command("run", "hello", "--trace", str(file), "--trace-filter", "io:0xe9") == 0
    text = "".join(chr(e.data or 0) for e in export.load(file).events)
    assert text == "Hello, KVM!\n"
    capfdbinary.readouterr()
    assert command("trace", "summary", str(file), "--json") == 0
    rows = json.loads(capfdbinary.readouterr().out)["rows"]
    assert {row["where"]: row["count"] for row in rows} == {"io 0xe9 out": 12}


def test_a_kernels_exits_are_traced_too(tmp_path: Path) -> None:
    kernel, file = tmp_path / "kernel", tmp_path / "boot.jsonl"
    kernel.write_bytes(tiny_kernel.elf(tiny_kernel.ENDS["power-off"]))
    words = ["boot", str(kernel), "--no-cache", "--memory", "16M", "--timeout", "60"]
    assert command(*words, "--trace", str(file)) == 0
    events = export.load(file).events
    assert events and events[-1].is_write and events[-1].reason == "io"


def test_a_filter_without_sense_is_wrong_usage(tmp_path: Path) -> None:
    file = str(tmp_path / "t")
    assert command("run", "hello", "--trace", file, "--trace-filter", "nonsense") == 2
    assert command("run", "hello", "--trace", str(tmp_path / "no" / "t")) == 1
