"""Snapshots in files: the same machine again, chains, lazily mapped memory, core files."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pykvm
from pykvm import result as reasons
from pykvm import vmcore
from pykvm.errors import SnapshotError

ENTRY = 0x8000
DATA = 0x100000
CODE = "mov rbx, [0x100000]; inc rbx; mov [0x101000], rbx; out 0xe9, al; hlt"


def machine(memory: str = "4M") -> pykvm.Machine:
    m = pykvm.Machine(memory)
    m.load(pykvm.asm(CODE, mode="long64"), at=ENTRY)
    m.cpu.enter("long64", entry=ENTRY)
    m.cpu.al = ord("x")
    m.pio.fifo(0xE9)
    m.memory.u64[DATA] = 41
    return m


def runs_as_it_should(m: pykvm.Machine, expected: int = 42) -> None:
    assert m.run(timeout=10).reason == reasons.HALTED
    assert m.memory.u64[DATA + 0x1000] == expected
    claim = m.pio.find(0xE9)
    assert claim is not None and claim.device.read() == b"x"


def test_it_comes_back_the_same(tmp_path: Path) -> None:
    with machine() as m, m.snapshot() as s:
        s.save(tmp_path / "one")
        before = bytes(m.memory[0 : 4 << 20])
        first = (tmp_path / "one").read_bytes()[:200]
        assert first.startswith(b"pykvm-snapshot 1 ") and b'"id"' in first
        status = (tmp_path / "one").stat()
        assert status.st_blocks * 512 < 1 << 20  # holes
        assert status.st_mode & 0o777 == 0o600  # a guest's memory has its keys
        for verify in (True, False):
            with pykvm.Snapshot.load(tmp_path / "one", verify=verify) as loaded:
                assert loaded.id == s.id and not s.diff(loaded)
                with loaded.fork() as again:
                    assert bytes(again.memory[0 : 4 << 20]) == before
                    runs_as_it_should(again)
                    loaded.restore(again)
                    assert bytes(again.memory[0 : 4 << 20]) == before
                    runs_as_it_should(again)


def test_in_another_process(tmp_path: Path) -> None:
    with machine() as m, m.snapshot() as s:
        s.save(tmp_path / "one")
    script = (
        "import sys, pykvm\n"
        "m = pykvm.Snapshot.load(sys.argv[1]).fork()\n"
        "print(m.run(timeout=10).reason, m.memory.u64[0x101000])\n"
        "m.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "one")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=100,
    )
    assert done.stdout.split() == ["halted", "42"], done.stderr


def test_a_chain(tmp_path: Path) -> None:
    with machine() as m:
        base = m.snapshot()
        base.save(tmp_path / "base")
        m.memory.u64[DATA] = 99
        m.memory.fill(0x200000, 0x3000, 7)
        middle = m.snapshot()
        middle.save(tmp_path / "middle", base=base)
        m.memory.fill(0x200000, 0x2000, 0)  # pages of zeros again
        m.memory.u8[0x300000] = 1
        top = m.snapshot()
        (tmp_path / "sub").mkdir()
        top.save(tmp_path / "sub" / "top", base=str(tmp_path / "middle"))
        assert (tmp_path / "middle").stat().st_size < 1 << 20
        with pykvm.Snapshot.load(tmp_path / "sub" / "top") as loaded:
            assert not top.diff(loaded)
            with loaded.fork() as again:
                assert bytes(again.memory[0 : 4 << 20]) == bytes(m.memory[0 : 4 << 20])
                runs_as_it_should(again, 100)
                loaded.restore(again)
                runs_as_it_should(again, 100)
        with pykvm.Snapshot.load(tmp_path / "middle") as loaded:
            assert not middle.diff(loaded)
        # Another base in its place is seen, and so is none.
        shutil.copy(tmp_path / "sub" / "top", tmp_path / "top")
        with pytest.raises(SnapshotError, match="built upon"):
            pykvm.Snapshot.load(tmp_path / "top")
        middle.save(tmp_path / "base")
        with pytest.raises(SnapshotError, match="was built upon"):
            pykvm.Snapshot.load(tmp_path / "middle")
        for each in (base, middle, top):
            each.close()


def test_what_is_damaged_or_newer_is_refused_with_the_reason(tmp_path: Path) -> None:
    with machine() as m, m.snapshot() as s:
        s.save(tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    start = good.index(b"\n") + 1

    def refused(data: bytes, reason: str, **options: bool) -> None:
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(SnapshotError, match=reason):
            pykvm.Snapshot.load(tmp_path / "bad", **options)

    refused(good.replace(b"snapshot 1", b"snapshot 2", 1), "version 2 .* reads 1")
    refused(b"", "no snapshot")
    refused(b"\x7fELF" + good, "no snapshot")
    refused(good[: start + 100], "ends within its header")
    refused(good.replace(b'"is_pc": false', b'"is_pc": true ', 1), "another checksum")
    refused(good[: len(good) // 2], "ends before its memory")
    at = good.index(pykvm.asm(CODE, mode="long64"))
    refused(good[:at] + b"\xcc" + good[at + 1 :], "memory at 0x.* has another checksum")
    (tmp_path / "bad").write_bytes(good[:at] + b"\xcc" + good[at + 1 :])
    pykvm.Snapshot.load(tmp_path / "bad", verify=False).close()  # it was told not to look


def test_nothing_is_left_behind(no_leak: None, tmp_path: Path) -> None:
    with machine() as m, m.snapshot() as s:
        s.save(tmp_path / "one")
        m.memory.u8[0x300000] = 1
        with m.snapshot() as more:
            more.save(tmp_path / "two", base=s)
        m.run(timeout=10)
        s.restore()
        list(m.fuzz(s, [b"x"] * 3, write_at=0x20000))
        with s.fork() as fork:
            fork.run(timeout=10)
        m.dump(tmp_path / "core")
        vmcore.machine(tmp_path / "core").close()
    with pykvm.Snapshot.load(tmp_path / "two") as loaded, loaded.fork() as fork:
        fork.run(timeout=10)
        loaded.restore(fork)
    (tmp_path / "one").write_bytes(b"damaged")
    for name in ("one", "two"):
        with pytest.raises(SnapshotError):
            pykvm.Snapshot.load(tmp_path / name)


def test_a_large_memory_costs_nothing_that_is_not_there(tmp_path: Path) -> None:
    with machine("2G") as m, m.snapshot() as s:
        s.save(tmp_path / "large")
    assert (tmp_path / "large").stat().st_blocks * 512 < 1 << 20
    with pykvm.Snapshot.load(tmp_path / "large") as loaded, loaded.fork() as again:
        runs_as_it_should(again)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    with machine() as m, m.snapshot() as s:
        s.save(tmp_path / "one")
        old = (tmp_path / "one").read_bytes()

        def full(*arguments: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("pykvm.snapshot.file.os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            s.save(tmp_path / "one")
        assert (tmp_path / "one").read_bytes() == old
        assert [each.name for each in tmp_path.iterdir()] == ["one"]


# ---- core files --------------------------------------------------------------------------------


def test_a_core_file_is_what_tools_expect(tmp_path: Path) -> None:
    elffile = pytest.importorskip("elftools.elf.elffile")
    with machine() as m:
        m.cpu.r15 = 0x1234
        m.dump(tmp_path / "core")
        with open(tmp_path / "core", "rb") as file:
            elf = elffile.ELFFile(file)
            assert elf["e_type"] == "ET_CORE" and elf["e_machine"] == "EM_X86_64"
            note, memory = elf.iter_segments()
            assert memory["p_paddr"] == 0 and memory["p_memsz"] == 4 << 20
            assert memory.data()[DATA : DATA + 8] == (41).to_bytes(8, "little")
            names = [(each["n_name"], each["n_type"]) for each in note.iter_notes()]
            assert names == [("CORE", "NT_PRSTATUS"), ("QEMU", 0)]


@pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed")
def test_gdb_opens_a_core_file(tmp_path: Path) -> None:
    with machine() as m:
        m.cpu.r15 = 0x1234
        m.dump(tmp_path / "core")
    commands = ["info registers rip r15", "x/1gx 0x100000", "x/2i $rip"]
    done = subprocess.run(
        ["gdb", "-batch", "-nx", "-ex", "set architecture i386:x86-64"]
        + [f"-ex=core-file {tmp_path / 'core'}"]
        + [f"-ex={command}" for command in commands],
        capture_output=True,
        text=True,
        timeout=60,
        # A sanitizer that is loaded into us is none of gdb's, which would take minutes to start.
        env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
    )
    assert "0x8000" in done.stdout and "0x1234" in done.stdout, done.stdout + done.stderr
    assert "0x0000000000000029" in done.stdout and "inc" in done.stdout


VMCOREINFO = b"""OSRELEASE=6.1.0-tiny
PAGESIZE=4096
SYMBOL(init_uts_ns)=ffffffff80100000
OFFSET(uts_namespace.name)=0
SYMBOL(swapper_pg_dir)=ffffffff80001000
SYMBOL(_stext)=ffffffff80008000
SYMBOL(mem_section)=ffffffff80100000
LENGTH(mem_section)=2048
SIZE(mem_section)=16
OFFSET(mem_section.section_mem_map)=0
NUMBER(SECTION_SIZE_BITS)=27
NUMBER(MAX_PHYSMEM_BITS)=46
NUMBER(phys_base)=0
NUMBER(pgtable_l5_enabled)=0
KERNELOFFSET=0
NUMBER(KERNEL_IMAGE_SIZE)=1073741824
"""
"""What a Linux whose page tables are the tiny guest's would say of itself."""


def linux_note(info: bytes, kind: int = 0) -> bytes:
    """As the kernel has it in memory (append_elf_note() in kernel/crash_core.c)."""
    return struct.pack("<III", 11, len(info), kind) + b"VMCOREINFO\0\0" + info


def vmcoreinfo_of(path: Path) -> list[bytes]:
    elffile = pytest.importorskip("elftools.elf.elffile")
    with open(path, "rb") as file:
        notes = next(elffile.ELFFile(file).iter_segments()).iter_notes()
        return [bytes(each["n_descdata"]) for each in notes if each["n_name"] == "VMCOREINFO"]


def test_what_a_linux_kernel_says_of_itself_is_in_the_core_file(tmp_path: Path) -> None:
    with machine() as m:
        m.load(b"VMCOREINFO\0" * 100, at=0x200000)  # it is not at 12 bytes from a page's beginning
        m.load(linux_note(VMCOREINFO, kind=1), at=0x210000)
        m.load(linux_note(b"something else"), at=0x220000)
        m.load(linux_note(VMCOREINFO)[:4] + b"\xff" * 4 + b"\0" * 4 + b"VMCOREINFO\0", at=0x230000)
        m.load((linux_note(VMCOREINFO))[:23], at=m.memory.size - 4096)
        m.dump(tmp_path / "core")
        assert vmcoreinfo_of(tmp_path / "core") == []
        m.load(linux_note(VMCOREINFO), at=0x240000)
        m.load(linux_note(VMCOREINFO + b"another"), at=0x250000)
        m.dump(tmp_path / "core")
        assert vmcoreinfo_of(tmp_path / "core") == [VMCOREINFO]
    vmcore.machine(tmp_path / "core").close()


def test_drgn_opens_a_core_file_of_linux(tmp_path: Path) -> None:
    drgn = pytest.importorskip("drgn")
    with machine() as m:
        m.dump(tmp_path / "core")
        with pytest.raises(ValueError, match="QEMU"):  # which of others it does not
            drgn.Program().set_core_dump(tmp_path / "core")
        m.load(linux_note(VMCOREINFO), at=0x240000)
        m.dump(tmp_path / "core")
        program = drgn.Program()
        program.set_core_dump(tmp_path / "core")
        assert program.read(DATA, 8, True) == (41).to_bytes(8, "little")
        assert program.read(DATA, 8) == (41).to_bytes(8, "little")  # by the guest's page tables


def test_the_way_in_from_a_core_file(tmp_path: Path) -> None:
    with machine() as m:
        m.dump(tmp_path / "core")
    with vmcore.machine(tmp_path / "core") as again:
        again.pio.fifo(0xE9)
        assert again.cpu.rip == ENTRY
        runs_as_it_should(again)


def test_the_way_in_from_raw_memory_and_registers(tmp_path: Path) -> None:
    with machine() as m:
        (tmp_path / "ram").write_bytes(m.memory[0 : 4 << 20])
        sregs = m.cpu.load_sregs()
        registers = {"rip": ENTRY, "rflags": 2, "rax": ord("x")}
        registers |= {name: getattr(sregs, name) for name in ("cr0", "cr3", "cr4", "efer")}
        code = 0x10, 0xFFFFFFFF, 0xA09B00, 0
        data = 0x18, 0xFFFFFFFF, 0xC09300, 0
    with vmcore.machine(
        tmp_path / "ram", registers | {"cs": code, "ss": data, "ds": data}
    ) as again:
        again.pio.fifo(0xE9)
        runs_as_it_should(again)
    with pytest.raises(SnapshotError, match="no register 'xyz'"):
        vmcore.machine(tmp_path / "ram", {"xyz": 1})
    (tmp_path / "bad").write_bytes(b"\x7fELF" + bytes(100))
    with pytest.raises(SnapshotError, match="no 64-bit"):
        vmcore.machine(tmp_path / "bad")
