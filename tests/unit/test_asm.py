"""pykvm.asm: what it builds, what it refuses and how it says so."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest

import pykvm
from pykvm import assembler
from pykvm.assembler import Code, asm, asm_file
from pykvm.errors import AsmError


@pytest.fixture(autouse=True)
def _empty_cache() -> None:
    assembler._build_once.cache_clear()


def test_the_package_offers_the_function_also_after_the_module_was_imported() -> None:
    assert pykvm.asm is asm
    assert pykvm.Code is Code


def test_the_example_of_the_readme() -> None:
    code = asm("mov al,'H'; out 0xe9,al; hlt", mode="long64")
    assert code == bytes.fromhex("b0 48 e6 e9 f4")
    assert (code.mode, code.at, dict(code.symbols)) == ("long64", 0, {})


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("real16", "66 b8 78 56 34 12"),  # the prefix makes a 32-bit operand
        ("prot32", "b8 78 56 34 12"),
        ("long64", "b8 78 56 34 12"),
    ],
)
def test_modes_decide_the_encoding(mode: Any, expected: str) -> None:
    assert asm("mov eax, 0x12345678", mode) == bytes.fromhex(expected)


def test_a_source_may_change_mode() -> None:
    code = asm("mov ax, 1; .code32; mov ax, 1; .code64; mov rax, rbx", "real16")
    assert code == bytes.fromhex("b8 01 00  66 b8 01 00  48 89 d8")


@pytest.mark.parametrize(
    ("text", "mode", "expected"),
    [
        ("mov al, es:[bx]", "real16", "268a07"),
        ("mov eax, fs:[0x10]", "long64", "648b042510000000"),
        ("jmp 8:0x1234", "real16", "ea34120800"),
        ("l: jmp 0x18:l", "prot32", "ea000000001800"),
    ],
)
def test_segments_go_before_a_colon(text: str, mode: Any, expected: str) -> None:
    assert asm(text, mode=mode).hex() == expected


def test_att_syntax() -> None:
    text = "movb $0x48, %al; outb %al, $0xe9; hlt"
    assert asm(text, syntax="att") == bytes.fromhex("b0 48 e6 e9 f4")
    with pytest.raises(AsmError):
        asm(text)


def test_at_makes_absolute_references_and_labels_right() -> None:
    code = asm("start: mov eax, [value]; hlt; value: .long 7", "prot32", at=0x8000)
    assert code == bytes.fromhex("a1 06 80 00 00 f4 07 00 00 00")
    assert code.symbols == {"start": 0x8000, "value": 0x8006}
    assert code.at == 0x8000


def test_at_may_be_in_the_upper_half() -> None:
    code = asm("x: lea rax, [rip + x]; movabs rax, offset x", at=0xFFFFFFFF80000000)
    assert code.symbols["x"] == 0xFFFFFFFF80000000
    assert code[-8:] == (0xFFFFFFFF80000000).to_bytes(8, "little")


def test_data_and_bss_follow_the_code_and_bss_is_zeros() -> None:
    code = asm(
        ".bss; b: .skip 3; .data; d: .byte 2; .section .rodata; r: .byte 1; .text; hlt", at=0x100
    )
    assert code == b"\xf4\x01\x02\0\0\0"
    assert code.symbols == {"r": 0x101, "d": 0x102, "b": 0x103}


def test_a_section_of_ones_own_is_in_the_image() -> None:
    assert asm('hlt; .section mine, "a"; .byte 0x55') == b"\xf4\x55"


def test_constants_from_the_caller() -> None:
    code = asm("mov eax, PORT; mov rbx, BIG", symbols={"PORT": 0x3F8, "BIG": 1 << 63})
    assert code == bytes.fromhex("b8 f8 03 00 00  48 bb 00 00 00 00 00 00 00 80")


def test_local_labels_are_not_symbols() -> None:
    assert asm("1: jmp 1b; .Lx: hlt; here: nop").symbols == {"here": 3}


def test_empty_text_is_no_code() -> None:
    assert asm("") == b"" and asm("# only a comment\n") == b""


def test_windows_line_ends() -> None:
    assert asm("nop\r\nhlt\r\n") == b"\x90\xf4"


def test_code_is_bytes_and_says_what_it_is() -> None:
    code = asm("nop; hlt", "prot32", at=0x7C00)
    assert isinstance(code, bytes) and code + b"!" == b"\x90\xf4!"
    assert repr(code) == "<Code prot32 at=0x7c00 2 bytes: 90 f4>"


def test_code_can_be_pickled_for_another_process_and_copied() -> None:
    code = asm("nop; here: hlt", "prot32", at=0x7C00)
    for again in (pickle.loads(pickle.dumps(code)), copy.deepcopy(code)):
        assert again == code and again.symbols == {"here": 0x7C01}
        assert (again.mode, again.at) == ("prot32", 0x7C00)


# -- what is refused -----------------------------------------------------------------------------


def test_an_error_quotes_the_line_and_the_assembler() -> None:
    with pytest.raises(AsmError) as caught:
        asm("nop\n  bogus eax, 1\nhlt")
    assert "line 2: no such instruction: `bogus eax,1'" in str(caught.value)
    assert "\n    bogus eax, 1" in str(caught.value)


def test_every_bad_line_is_named_once_up_to_a_limit() -> None:
    with pytest.raises(AsmError) as caught:
        asm("\n".join(f"bad{n}" for n in range(9)) + "\n.rept 9\n")
    text = str(caught.value)
    assert "line 5: " in text and "line 6: " not in text and "and 5 more" in text
    with pytest.raises(AsmError) as caught:
        asm(".rept 9\nbogus\n.endr")
    assert str(caught.value).count("bogus'") == 1


@pytest.mark.parametrize(
    "text", ["mov al, 300", ".byte 0x1234", "mov byte ptr [rax], 0x1ff", "out 0x100, al"]
)
def test_a_value_that_does_not_fit_is_an_error_not_a_warning(text: str) -> None:
    with pytest.raises(AsmError, match="line 1"):
        asm(text)


def test_an_undefined_symbol_is_named_with_its_line() -> None:
    with pytest.raises(AsmError) as caught:
        asm("nop\ncall nowhere2\ncall nowhere\n")
    text = str(caught.value)
    assert "line 2: undefined symbol 'nowhere2'\n    call nowhere2" in text
    assert "line 3: undefined symbol 'nowhere'\n    call nowhere" in text


def test_an_address_that_does_not_fit_its_field() -> None:
    with pytest.raises(AsmError, match="relocation truncated"):
        asm("mov ax, offset x; x:", "real16", at=0x12345)


@pytest.mark.parametrize("line", ["#include <stdio.h>", "#define A 1", "#ifdef X"])
def test_preprocessor_directives_are_not_taken_for_comments(line: str) -> None:
    with pytest.raises(AsmError, match="preprocessor"):
        asm(f"nop\n{line}\n")
    assert asm("# if this were a directive, it would start without a space\nnop") == b"\x90"


@pytest.mark.parametrize(
    "bad", [{"mode": "real32"}, {"syntax": "nasm"}, {"at": -1}, {"at": 1 << 64}]
)
def test_bad_arguments(bad: dict[str, Any]) -> None:
    with pytest.raises(AsmError):
        asm("nop", **bad)


def test_without_binutils_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AsmError, match="apt install binutils"):
        asm("nop")


def test_an_assembler_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "as"
    fake.write_text("#!/bin/sh\nexec sleep 600\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(assembler, "_TIMEOUT_SECONDS", 0.2)
    with pytest.raises(AsmError, match="still busy"):
        asm("nop")


# -- what it leaves behind -----------------------------------------------------------------------


def _count_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    runs: list[str] = []
    real = subprocess.run

    def counted(command: list[str], **rest: Any) -> Any:
        runs.append(command[0])
        return real(command, **rest)

    monkeypatch.setattr(subprocess, "run", counted)
    return runs


def test_the_same_source_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = _count_runs(monkeypatch)
    assert asm("nop", at=8) is asm("nop", at=8)
    assert runs == ["as", "ld"]
    asm("nop", at=16)
    asm("nop", at=8, mode="prot32")
    asm("nop", at=8, symbols={"a": 1})
    assert len(runs) == 8


def test_the_cache_has_a_limit() -> None:
    assert assembler._build_once.cache_info().maxsize == assembler._CACHED


def test_a_failure_is_not_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as without_binutils:
        without_binutils.setenv("PATH", str(tmp_path))
        with pytest.raises(AsmError):
            asm("nop")
    assert asm("nop") == b"\x90"


def test_code_cannot_be_changed_under_the_cache() -> None:
    with pytest.raises(TypeError):
        asm("here: nop").symbols["here"] = 1  # type: ignore[index]


def test_files_and_descriptors_are_gone_after_success_and_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = set(os.listdir("/proc/self/fd"))
    asm("nop")
    for bad in ("bogus", "call nowhere"):
        with pytest.raises(AsmError):
            asm(bad)
    assert set(os.listdir("/proc/self/fd")) == before
    assert list(tmp_path.iterdir()) == []


# -- files ---------------------------------------------------------------------------------------


def test_a_file_may_include_its_neighbour_and_is_not_cached(tmp_path: Path) -> None:
    (tmp_path / "ports.inc").write_text(".equ PORT, 0xe9\n")
    file = tmp_path / "guest.S"
    file.write_text('.include "ports.inc"\nout PORT, al\n')
    assert asm_file(file) == b"\xe6\xe9"
    (tmp_path / "ports.inc").write_text(".equ PORT, 0xf4\n")
    assert asm_file(file) == b"\xe6\xf4"


def test_an_error_in_an_included_file_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "part.inc").write_text("nop\nbogus\n")
    file = tmp_path / "guest.S"
    file.write_text('.include "part.inc"\n')
    with pytest.raises(AsmError, match=r"part\.inc, line 2: no such instruction"):
        asm_file(file)
