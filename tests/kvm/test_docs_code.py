"""The programs in the documents run, and say what the documents say."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

from pykvm.debug import probe

DOCS = Path(__file__).resolve().parents[2] / "docs"


def programs(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def execute(program: str) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(program, "the document", "exec"), {})
        return out.getvalue()

    return execute


README = "../README.md"


def test_the_readmes_example_prints_what_it_says(run: Any) -> None:
    program = programs(README)[0]
    told = (DOCS / README).read_text().split("prints\n\n```\n")[1].split("```")[0]
    differs = re.compile(r", [0-9.e+]+ m?s$|, (2M|1G) page(.|\n)*", re.MULTILINE)  # by machine
    assert differs.sub("", run(program)) == differs.sub("", told)
    assert "(4-level" in differs.sub("", told)


def test_the_readmes_fuzzer_finds_the_bug_and_its_file_runs(run: Any) -> None:
    (program,) = (text for text in programs(README) if "m.fuzz(" in text)
    message, result = run(program).splitlines()
    assert message.startswith('b"KVM' if "'" in message else "b'KVM")
    assert result.startswith("debug-exit 0 after ")


def test_the_readmes_ioctls_are_traced(run: Any, capfd: pytest.CaptureFixture[str]) -> None:
    (program,) = (text for text in programs(README) if "kvm.trace()" in text)
    assert int(run(program)) > 0
    assert re.fullmatch(
        r"ioctl\(vcpu \d+, KVM_SET_REGS, {.*rip=0x1000,.*}\) = 0\n", capfd.readouterr().err
    )


def test_tracing(run: Any, tmp_path: Path) -> None:
    (program,) = programs("tracing.md")
    text = run(program)
    assert "601 exits" in text and "io 0xe9 out" in text
    assert (tmp_path / "timeline.svg").read_text().startswith("<svg")


def test_snapshots(run: Any, tmp_path: Path) -> None:
    (program,) = (text for text in programs("snapshots.md") if "diff.svg" in text)
    assert "cpu 0 regs.rdi: 0x0 → 0x68000" in run(program)
    assert (tmp_path / "diff.svg").read_text() == (DOCS / "pictures/diff.svg").read_text()


def test_determinism(run: Any) -> None:
    _, program = programs("determinism.md")
    lines = run(program).splitlines()
    assert lines[0].startswith("<exit 1: in 0x40, 1 byte: ") and lines[3] == "<exit 4: hlt>"
    assert lines[4] == "replayed []"
    assert re.match(r"at exit 1 .* expected in 0x40, .*; found in 0x41, 1 byte \(at", lines[5])


def test_a_limit_on_instructions(run: Any) -> None:
    program, _ = programs("determinism.md")
    assert run(program).splitlines() == ["step 101 26", "step 101 26", "halted 200 50"]
    assert "# step 101 26, twice; halted 200 50" in program


def test_debugging(run: Any) -> None:
    program, _ = programs("debugging.md")
    lines = run(program).splitlines()
    assert lines[0] == "144"
    assert lines[1] == "<breakpoint at 0x8005, cpu 0>"
    assert lines[2] == "step 2"
    assert "02 00 00 00" in lines[3] or "00 00 00 00" in lines[3] or lines[3].startswith("<watch")
    assert lines[4] == "step"
    assert lines[5].startswith("debug-exit")


def test_what_was_executed(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("capstone")
    pytest.importorskip("unicorn")
    _, program = programs("debugging.md")
    text = run(program)
    assert "start:" in text and "mov ecx, 4" in text
    for line in ("<Coverage 8 of 9 blocks>", "<Comparison: 35 steps the same>"):
        assert f"# {line}" in program and line in text
    assert (tmp_path / "guest.drcov").stat().st_size > 100
    for name in ("walk.svg", "blocks.svg"):
        assert (tmp_path / name).read_text() == (DOCS / "pictures" / name).read_text(), name


def test_the_table_of_ways_names_all_of_them() -> None:
    told = re.findall(r"^\| `([a-z-]+)` \|", (DOCS / "debugging.md").read_text(), re.MULTILINE)
    assert told == ["port", "hardware", "watch", "software", "step"]
    assert set(told) == set(probe.WAYS)
