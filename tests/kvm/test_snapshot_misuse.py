"""Snapshots when something else has changed: closed, replaced, no room. It is said; no harm."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pykvm
from pykvm._abi import ffi
from pykvm.errors import ClosedError, SnapshotError
from pykvm.kvm import Vm
from pykvm.snapshot_pool import SnapshotPool
from tests.support.pool_work import COUNTER, counter
from tests.support.waiting import PATIENCE, is_alive, until

INPUT = 0x30000


@pytest.fixture
def m() -> Iterator[pykvm.Machine]:
    """A machine whose guest counts at COUNTER and halts."""
    with pykvm.Machine("2M") as made:
        made.load(pykvm.asm("inc dword ptr [0x20000]; hlt", mode="long64"), at=0x8000)
        made.cpu.enter("long64", entry=0x8000)
        yield made


def fuzzing(m: pykvm.Machine, s: pykvm.Snapshot) -> Iterator[Any]:
    """A fuzz loop that has begun."""
    outcomes = m.fuzz(s, iter([b"x"] * 1000), write_at=INPUT, batch=2)
    next(outcomes)
    return outcomes


# ---- closed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["snapshot", "machine", "memory"])
def test_what_was_closed_is_not_restored(m: pykvm.Machine, what: str) -> None:
    with m.snapshot() as s:
        s.restore()
        m.run(timeout=10)
        fork = s.fork()
        s.restore(fork)
        fork.run(timeout=10)
        parts: dict[str, Any] = {"snapshot": s, "machine": fork, "memory": fork.memory}
        parts[what].close()
        with pytest.raises(ClosedError):
            s.restore(fork)
        fork.close()


@pytest.mark.parametrize("what", ["snapshot", "machine"])
def test_a_fuzz_loop_ends_with_what_it_needs(m: pykvm.Machine, what: str) -> None:
    with m.snapshot() as s, s.fork() as fork:
        outcomes = fuzzing(fork, s)
        (s if what == "snapshot" else fork).close()
        with pytest.raises(ClosedError):
            list(outcomes)


def test_a_machine_that_got_more_memory_is_another(m: pykvm.Machine) -> None:
    with m.snapshot() as s:
        s.restore()
        outcomes = fuzzing(m, s)
        m.memory.add(0x400000, 0x1000)
        m.memory.u32[0x400000] = 1
        with pytest.raises(SnapshotError, match="memory map is another"):
            s.restore()
        with pytest.raises(SnapshotError, match="memory map is another"):
            list(outcomes)


# ---- files ---------------------------------------------------------------------------------------


def test_a_snapshot_is_not_saved_over_what_it_builds_upon(m: pykvm.Machine, tmp_path: Path) -> None:
    first, second, link = tmp_path / "first", tmp_path / "second", tmp_path / "link"
    with m.snapshot() as s:
        s.save(first)
        link.symlink_to(first)
        m.run(timeout=10)
        with m.snapshot() as later:
            for path in (first, link):
                with pytest.raises(SnapshotError, match="builds upon"):
                    later.save(path, base=s)
            later.save(second, base=s)
            with m.snapshot() as last, pytest.raises(SnapshotError, match="builds upon"):
                last.save(first, base=later)
    with pykvm.Snapshot.load(second) as again:
        assert again.read(COUNTER, 1) == b"\1"


def test_a_base_whose_file_is_another_by_now_is_refused(m: pykvm.Machine, tmp_path: Path) -> None:
    with m.snapshot() as s:
        s.save(tmp_path / "one")
        m.run(timeout=10)
        with m.snapshot() as later:
            later.save(tmp_path / "one")
            with pytest.raises(SnapshotError, match="is the snapshot"):
                later.save(tmp_path / "two", base=s)
        assert os.listdir(tmp_path) == ["one"]


Save = Callable[[pykvm.Machine, pykvm.Snapshot, Path], None]


@pytest.mark.parametrize(
    "save",
    [lambda m, s, path: s.save(path), lambda m, s, path: m.dump(path)],
    ids=["snapshot", "core"],
)
def test_on_a_full_disk_the_file_that_was_there_stays(
    m: pykvm.Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Save
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"as it was")

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with m.snapshot() as s:
        monkeypatch.setattr("pykvm.snapshot.atomic.write_all", full)
        with pytest.raises(OSError, match="No space left"):
            save(m, s, path)
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"as it was"


def test_what_cannot_be_written_is_told_by_the_name_that_was_given(
    m: pykvm.Machine, tmp_path: Path
) -> None:
    with m.snapshot() as s:
        for path in (tmp_path / "nowhere" / "file", Path("/dev/null")):
            with pytest.raises(OSError, match=r"file'$|/dev/null'$"):
                s.save(path)
    assert Path("/dev/null").is_char_device() and not os.listdir(tmp_path)


class Device:
    """One whose state a file cannot have."""

    def state(self) -> dict[str, bytes]:
        return {"fifo": b"bytes"}

    def restore(self, state: dict[str, bytes]) -> None:
        pass

    def read(self, access: object) -> int:
        return 0


def test_a_state_that_no_file_can_have_is_told_with_its_device(
    m: pykvm.Machine, tmp_path: Path
) -> None:
    m.on_pio(0x70, Device().read)
    with m.snapshot() as s:
        s.restore()
        with pytest.raises(SnapshotError, match=r"the device at pio:0x70: .*bytes"):
            s.save(tmp_path / "s")
    assert not os.listdir(tmp_path)


# ---- pools ---------------------------------------------------------------------------------------


def test_a_pool_is_of_its_snapshot_whatever_became_of_the_file(
    m: pykvm.Machine, tmp_path: Path
) -> None:
    with m.snapshot() as s:
        s.save(tmp_path / "file")
        m.run(timeout=10)
        with m.snapshot() as later:
            later.save(tmp_path / "file")
        with SnapshotPool(s, workers=1) as pool:
            assert pool.submit(counter).result(60) == 0
        assert s.path == str(tmp_path / "file")


KILLED = """
import os, signal, pykvm
from pykvm.snapshot_pool import SnapshotPool
from tests.support.pool_work import pid
if __name__ == "__main__":
    with pykvm.Machine("2M") as m, m.snapshot() as s, SnapshotPool(s, workers=1) as pool:
        print(pool.submit(pid).result(60), pool._folder.name, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_pool_whose_process_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": root},
        stdout=subprocess.PIPE,
        timeout=PATIENCE,
    )
    assert done.returncode == -signal.SIGKILL
    worker, folder = done.stdout.decode().split()
    until("the worker's end", lambda: not is_alive(int(worker)))
    assert not Path(folder).exists()


# ---- fuzz loops ----------------------------------------------------------------------------------


def test_the_machine_may_be_run_and_changed_between_outcomes() -> None:
    code = "inc dword ptr [0x20000]; add eax, [0x20000]; add eax, [0x40000]; out 0x10, eax"
    with pykvm.Machine("2M") as m:
        m.load(pykvm.asm(code, mode="long64"), at=0x8000)
        m.cpu.enter("long64", entry=0x8000)
        with m.snapshot() as s, m.snapshot() as other:
            codes = []
            for outcome in m.fuzz(s, [b""] * 8, write_at=INPUT, until=0x10, batch=2):
                codes.append(outcome.code)
                if len(codes) == 2:
                    m.run(timeout=10)
                elif len(codes) == 4:
                    m.memory.u32[0x40000] = 7
                    m.cpu.rax = 5
                elif len(codes) == 6:
                    m.run(timeout=10)
                    other.restore(m)
            assert codes == [1] * 8


def test_what_a_handler_raises_says_at_which_input(m: pykvm.Machine) -> None:
    m.load(pykvm.asm("mov al, [0x30000]; out 0x50, al; hlt", mode="long64"), at=0x8000)
    m.on_pio(0x50, lambda access: 1 // (access.value - ord("b")))
    with m.snapshot() as s, pytest.raises(ZeroDivisionError) as caught:
        list(m.fuzz(s, [b"a", b"b", b"c"], write_at=INPUT))
    assert caught.value.__notes__ == ["while it ran the input b'b'"]


@pytest.mark.parametrize(
    ("inputs", "options", "error"),
    [
        ([5], {}, TypeError),
        (["text"], {}, TypeError),
        ([b"x" * 4097], {}, ValueError),
        ([b"x"], {"timeout": -1}, ValueError),
        ([b"x"], {"timeout": float("nan")}, ValueError),
        ([b"x"], {"max_exits": -1}, ValueError),
        ([b"x"], {"batch": 0}, ValueError),
    ],
)
def test_what_makes_no_sense_to_a_fuzz_loop_is_refused(
    m: pykvm.Machine, inputs: list[Any], options: dict[str, Any], error: type[Exception]
) -> None:
    with m.snapshot() as s:
        with pytest.raises(error):
            list(m.fuzz(s, inputs, write_at=INPUT, **options))
        (outcome,) = m.fuzz(s, [b"y"], write_at=INPUT, timeout=float("inf"))
        assert outcome.reason == "halted"


# ---- a host with more state than the one it was taken on -----------------------------------------


def test_kvm_reads_nothing_behind_an_xsave_area_shorter_than_its_own(
    m: pykvm.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KVM_SET_XSAVE reads KVM_CAP_XSAVE2 bytes, whatever we hand it."""
    given: dict[str, int] = {}
    ask = Vm.check_extension

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(ffi, name)

        def from_buffer(self, type: str, room: bytearray) -> Any:
            given[type] = len(room)
            return ffi.from_buffer(type, room)

    with m.snapshot() as s:
        monkeypatch.setattr(
            Vm, "check_extension", lambda vm, cap: 12288 if "XSAVE2" in str(cap) else ask(vm, cap)
        )
        monkeypatch.setattr("pykvm.snapshot.vcpu.ffi", Watched())
        s.restore()
        assert given["struct kvm_xsave *"] == 12288
        assert m.run(timeout=10).reason == "halted"
