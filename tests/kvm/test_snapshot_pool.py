"""Forks of a snapshot in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import pykvm
from pykvm.snapshot_pool import SnapshotPool
from tests.support.pool_work import attach, double, fail, slowly


def test_every_call_begins_at_the_snapshot_and_both_processes_work() -> None:
    code = "mov rax, [0x20000]; add rax, rax; inc dword ptr [0x30000]; hlt"
    with pykvm.Machine("2M") as m:
        m.load(pykvm.asm(code, mode="long64"), at=0x8000)
        m.cpu.enter("long64", entry=0x8000)
        s = m.snapshot()
    with s, SnapshotPool(s, workers=2, setup=attach) as pool:
        done = list(pool.map(slowly, range(8), chunk=1))
        assert [each[0] for each in done] == [2 * n for n in range(8)]
        assert {each[1] for each in done} == {0}
        assert len({each[2] for each in done}) == 2 and os.getpid() not in {e[2] for e in done}
        assert pool.submit(double, 21).result(60)[0] == 42
        with pytest.raises(KeyError, match="mine"):
            pool.submit(fail).result(60)
        assert pool.submit(double, 4).result(60)[0] == 8
        assert not s.path


SCRIPT = """
import os
import pykvm
from pykvm.snapshot_pool import SnapshotPool

def run(machine, number):
    machine.cpu.rax = number
    os.write(1, b"runs %d\\n" % number)
    return machine.run().reason

if __name__ == "__main__":
    with pykvm.Machine("2M") as m:
        m.load(pykvm.asm("cmp eax, 0; jne w; hlt; w: jmp w", mode="long64"), at=0x8000)
        m.cpu.enter("long64", entry=0x8000)
        s = m.snapshot()
    with s, SnapshotPool(s, workers=1) as pool:
        print(pool._folder.name, flush=True)
        for reason in pool.map(run, [0, 1, 2], chunk=1):
            os.write(1, reason.encode() + b"\\n")
"""


def test_ctrl_c_ends_the_pool_with_what_its_processes_are_at(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, "."])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert folder.is_dir()
        lines = [process.stdout.readline() for _ in range(3)]
        assert sorted(lines) == ["halted\n", "runs 0\n", "runs 1\n"]
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
        out, err = process.communicate(timeout=100)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGINT
    assert "runs 2" not in out
    assert err.count("Traceback") == 1 and err.endswith("KeyboardInterrupt\n")
    assert not folder.exists()
