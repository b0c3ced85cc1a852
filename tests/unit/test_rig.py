"""The rig's own logic, without QEMU: a shell script stands in for it and plays the guest."""

from __future__ import annotations

import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rig import __main__ as rig
from tests.rig import guest, host, initramfs

# -- the initramfs ----------------------------------------------------------------------------


def read_cpio(archive: bytes) -> list[tuple[str, int, bytes]]:
    """A plain reading of the "newc" format, up to its trailer."""
    found: list[tuple[str, int, bytes]] = []
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        field = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = field[1], field[6], field[11]
        name_at = at + 110
        name = archive[name_at : name_at + name_size - 1].decode()
        assert archive[name_at + name_size - 1] == 0
        data_at = (name_at + name_size + 3) & ~3
        if name == "TRAILER!!!":
            return found
        found.append((name, mode, archive[data_at : data_at + size]))
        at = (data_at + size + 3) & ~3


names = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=1, max_size=20)


@given(st.lists(st.tuples(names, st.integers(0, 0o177777), st.binary(max_size=50)), max_size=6))
def test_an_archive_holds_what_was_put_in(entries: list[tuple[str, int, bytes]]) -> None:
    assert read_cpio(b"".join(initramfs.cpio(entries))) == entries


@pytest.mark.skipif(not shutil.which("cpio"), reason="cpio is not installed")
def test_cpio_itself_reads_the_archive(tmp_path: Path) -> None:
    entries = [("folder", 0o040755, b""), ("folder/a", 0o100644, b"odd"), ("b", 0o100755, b"")]
    archive = b"".join(initramfs.cpio(entries))
    subprocess.run(["cpio", "-i", "--quiet"], input=archive, cwd=tmp_path, check=True, timeout=20)
    assert (tmp_path / "folder" / "a").read_bytes() == b"odd"
    assert os.access(tmp_path / "b", os.X_OK)


@pytest.fixture
def module_tree(tmp_path: Path) -> Callable[..., Path]:
    """``module_tree(a="b,c")``: a folder of modules, each with what it depends on."""

    def make(**depends: str) -> Path:
        for name, text in depends.items():
            field = "softdep=pre: " if text.startswith("soft ") else "depends="
            data = f"\x7fELF\0name={name}\0{field}{text.removeprefix('soft ')}\0".encode()
            path = tmp_path / "modules" / "kernel" / f"{name.replace('_', '-')}.ko"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return tmp_path / "modules"

    return make


def test_a_module_comes_after_what_it_depends_on(module_tree: Callable[..., Path]) -> None:
    folder = module_tree(kvm_amd="kvm,ccp", kvm="irqbypass", irqbypass="", ccp="", other="")
    tree = initramfs.ModuleTree(folder)
    assert tree.closure(["kvm-amd", "kvm"]) == ["irqbypass", "kvm", "ccp", "kvm_amd"]


def test_a_soft_dependency_is_taken_if_there_is_one(module_tree: Callable[..., Path]) -> None:
    tree = initramfs.ModuleTree(module_tree(ext4="soft crc32c nothing", crc32c=""))
    assert tree.closure(["ext4"]) == ["crc32c", "ext4"]


def test_a_soft_dependency_may_be_an_alias(module_tree: Callable[..., Path]) -> None:
    alias = "\0alias=crc32c"
    folder = module_tree(ext4="soft crc32c", a_fast=alias, z_generic=alias, other="\0alias=crc32")
    assert initramfs.ModuleTree(folder).closure(["ext4"]) == ["z_generic", "ext4"]


def test_a_module_that_this_kernel_lacks_is_named(module_tree: Callable[..., Path]) -> None:
    tree = initramfs.ModuleTree(module_tree(a="b"))
    with pytest.raises(host.RigError, match="no module 'b'"):
        tree.closure(["a"])


def test_packed_modules_are_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.ko.xz").write_bytes(lzma.compress(b"\0depends=\0"))
    assert initramfs.ModuleTree(tmp_path).read("a") == b"\0depends=\0"


def test_no_modules_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(host.RigError, match="no kernel modules under"):
        initramfs.ModuleTree(tmp_path)


def test_the_initramfs_is_made_once_for_the_same_content(
    module_tree: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = dict.fromkeys(("virtio_pci", "9pnet_virtio", "9p", "overlay", "kvm_amd", "loop"), "")
    kernel = host.KernelImage(tmp_path / "vmlinuz-1", module_tree(**base))
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/sh")
    first = initramfs.build(kernel, [], tmp_path)
    made = first.stat().st_mtime_ns
    assert initramfs.build(kernel, [], tmp_path) == first
    assert first.stat().st_mtime_ns == made
    with_loop = initramfs.build(kernel, ["loop"], tmp_path)
    assert with_loop != first
    inside = [name for name, _, _ in read_cpio(with_loop.read_bytes())]
    assert "init" in inside and "modules/005-loop.ko" in inside


# -- what it needs of the host ----------------------------------------------------------------


def test_what_is_missing_is_named_to_who_cannot_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(host.RigError, match=r"sudo apt-get install .*qemu-system-x86 busybox-stat"):
        host.install_programs()


def test_a_kernel_without_its_modules_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "kernel" / "boot").mkdir(parents=True)
    (tmp_path / "kernel" / "boot" / "vmlinuz-6.1.0-1-amd64").touch()
    assert host.find_kernel(tmp_path) is None
    (tmp_path / "kernel" / "lib" / "modules" / "6.1.0-1-amd64").mkdir(parents=True)
    found = host.find_kernel(tmp_path)
    assert found is not None and found.release == "6.1.0-1-amd64"


def test_a_failing_program_is_quoted() -> None:
    with pytest.raises(host.RigError, match=r"(?s)sh -c .* failed \(3\):\nbecause"):
        host._run("sh", "-c", "echo because >&2; exit 3")


# -- what runs inside -------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(min_codepoint=1, max_codepoint=0x2FF)), min_size=1))
def test_the_command_gets_its_arguments_as_they_were(words: list[str]) -> None:
    script = guest._command_script(["printf", r"%s\0", *words], Path("/"), {"HOME": "/"})
    done = subprocess.run(
        ["sh"], input=script.encode(), capture_output=True, check=True, timeout=20
    )
    assert done.stdout.decode().split("\0")[:-1] == words


def test_the_command_starts_in_its_folder_with_its_environment(tmp_path: Path) -> None:
    folder = tmp_path / "a b'c"
    folder.mkdir()
    environment = {"HOME": str(tmp_path / "home"), "WORD": "two 'words'"}
    script = guest._command_script(["sh", "-c", 'pwd; echo "$WORD"; exit 7'], folder, environment)
    done = subprocess.run(["sh"], input=script, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (7, f"{folder}\ntwo 'words'\n")


def test_without_a_command_the_kvm_tests_run_and_demand_kvm() -> None:
    for words in ([], ["pytest"], ["--", "pytest"], ["pytest", "-k", "smp"]):
        command = rig.full_command(words)
        assert command[1:3] == ["-m", "pytest"] and "--require-kvm" in command
        assert command[-2:] == ["tests/kvm", "tests/guests"]
    for path in ("tests/unit/test_rig.py", "tests/unit/test_rig.py::test_x"):
        assert rig.full_command(["pytest", "-x", path])[-2:] == ["-x", path]
    assert rig.full_command(["--", "echo", "--", "x"]) == ["echo", "--", "x"]


def test_what_runs_inside_was_compiled_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulated, Python compiles longer than it runs; and a checkout may be read-only inside."""
    for name in ("pykvm/a.py", "tests/test_a.py", "tests/test_b.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("def test_it(): assert 1 == 1\n")
    (tmp_path / "tests" / "broken.py").write_text("this is no Python\n")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTEST_ADDOPTS", f"--junitxml={tmp_path}/report.xml --no-such-option")
    host.compile_ahead(tmp_path, ["tests/test_a.py"])
    made = sorted(
        re.sub(r"\.cpython-[0-9]+(-pytest)?[0-9.a-z-]*\.pyc", r"\1", path.name)
        for path in tmp_path.rglob("*.pyc")
    )
    assert made == ["a", "test_a", "test_a-pytest", "test_b"]
    assert not (tmp_path / "report.xml").exists()


def test_the_tests_that_a_command_names_are_seen() -> None:
    assert rig.named_paths(
        [sys.executable, "-m", "pytest", "-q", "tests/kvm/test_cli.py::test"]
    ) == ["tests/kvm/test_cli.py"]
    assert rig.named_paths(rig.full_command([])) == ["tests/kvm", "tests/guests"]
    assert rig.named_paths(["ls", "tests/kvm"]) == []


def test_what_is_covered_inside_is_what_the_first_process_covers() -> None:
    stage1 = guest.STAGE2.with_name("stage1.sh").read_text()
    covered = re.findall(r"mount -t tmpfs .* \$new(/\S+)", stage1)
    assert sorted(covered) == sorted(guest._COVERED)


def test_covered_folders_are_bound_once_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert guest.binds([tmp_path / "absent", Path("/usr")]) == []
    monkeypatch.setattr(guest, "_COVERED", (str(tmp_path),))
    inner, link = tmp_path / "outer" / "inner", tmp_path / "link"
    inner.mkdir(parents=True)
    link.symlink_to(inner)
    outer = inner.parent
    assert guest.binds([inner, outer, Path("/usr"), tmp_path / "absent"]) == [
        (str(outer), str(outer))
    ]
    assert (str(inner), str(link)) in guest.binds([link])


# -- booting, with a script for QEMU ----------------------------------------------------------

Boot = Callable[..., guest.Outcome]


@pytest.fixture
def printed() -> list[str]:
    """What ``boot`` passed on of the command's output."""
    return []


@pytest.fixture
def boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: list[str]) -> Boot:
    """``boot(script, timeout=…)``: what ``guest.boot`` makes of a QEMU that runs ``script``.

    The script finds the run folder in $RUN.
    """
    cache = tmp_path / "with space, and comma"
    cache.mkdir()

    def boot(script: str, timeout: float = 20.0) -> guest.Outcome:
        run = guest.run_folder(cache)
        fake = tmp_path / "bin" / "qemu-system-x86_64"
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(f"#!/bin/sh\nRUN={shlex.quote(str(run))}\n{script}\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", str(fake.parent), prepend=":")
        return guest.boot(
            ["true"],
            run=run,
            kernel=host.KernelImage(tmp_path / "vmlinuz", tmp_path / "1"),
            initramfs=tmp_path / "initramfs",
            cwd=tmp_path,
            environment={"HOME": "/"},
            timeout=timeout,
            machine=guest.Machine(),
            output=printed.append,
            console=lambda text: None,
        )

    return boot


def test_output_and_status_come_back(boot: Boot, printed: list[str]) -> None:
    outcome = boot(
        'touch "$RUN/started"; printf "a\\303\\244b" >"$RUN/output.log"; echo 3 >"$RUN/status"'
    )
    assert outcome.status == 3
    assert "".join(printed) == "aäb"


def test_a_guest_without_a_status_is_a_failure_with_the_last_of_its_console(boot: Boot) -> None:
    with pytest.raises(host.RigError, match=r"(?s)ended \(9\) .*Kernel panic.*QEMU said:\n.*oops"):
        boot('echo "Kernel panic" >"$RUN/console.log"; echo oops >&2; exit 9')


def _is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_guest_that_hangs_is_killed_with_all_its_processes(boot: Boot, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(
        guest.TimedOut, match=r"(?s)killed after 0.5 s, before it had booted.*stuck"
    ):
        boot(f'echo stuck >"$RUN/console.log"; sleep 600 & echo $! >{pid_file}; wait', timeout=0.5)
    pid = int(pid_file.read_text())
    end = time.monotonic() + 5  # init reaps it
    while _is_alive(pid) and time.monotonic() < end:
        os.sched_yield()
    assert not _is_alive(pid)


def test_a_guest_that_hangs_in_the_command_is_told_apart(boot: Boot) -> None:
    with pytest.raises(guest.TimedOut, match="while it ran the command"):
        boot('touch "$RUN/started"; exec sleep 600', timeout=0.5)


def test_a_machine_that_does_not_switch_off_is_killed(
    boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest, "POWEROFF_PATIENCE", 0.1)
    assert boot('echo 0 >"$RUN/status"; exec sleep 600').status == 0


def test_more_can_be_appended_to_the_kernels_command_line(tmp_path: Path) -> None:
    kernel = host.KernelImage(tmp_path / "vmlinuz", tmp_path)
    plain, more = (
        guest.qemu_command(guest.Machine(append=text), kernel, tmp_path / "i", tmp_path)
        for text in ("", "quiet")
    )
    (changed,) = ((a, b) for a, b in zip(plain, more, strict=True) if a != b)
    assert changed[1] == changed[0] + " quiet"


def test_qemu_is_told_paths_with_commas(tmp_path: Path) -> None:
    kernel = host.KernelImage(tmp_path / "vmlinuz", tmp_path / "1")
    command = guest.qemu_command(guest.Machine(), kernel, tmp_path / "i", Path("/a,b"))
    assert any("path=/a,,b/console.log" in word for word in command)
    assert not any(re.search(r"/a,b", word) for word in command)


def test_only_old_runs_are_removed(tmp_path: Path) -> None:
    kept = [guest.run_folder(tmp_path, keep=2) for _ in range(4)]  # unfinished: all going on
    for number, folder in enumerate(kept):
        (folder / "status").touch()
        os.utime(folder, (number, number))
    new = guest.run_folder(tmp_path, keep=2)
    assert sorted((tmp_path / "runs").iterdir()) == sorted([*kept[2:], new])


def test_the_rigs_own_failures_have_statuses_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise host.RigError("no QEMU here")

    monkeypatch.setattr(host, "install_programs", fails)
    assert rig.main(["--dir", str(tmp_path), "--setup-only"]) == rig.RIG_FAILED
    assert "rig: no QEMU here" in capsys.readouterr().err
