"""The shipped guests as files: complete, fresh, found; and what `pykvm run NAME|FILE` means."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import pykvm.result
from pykvm import guestlib
from pykvm.assembler import asm_file
from pykvm.boot import elf
from pykvm.errors import AsmError
from pykvm.guestlib import Guest

NAMES = guestlib.names()
ASSEMBLED = [name for name in NAMES if guestlib.find(name).image.suffix == ".bin"]
IN_C = [name for name in NAMES if name not in ASSEMBLED]


def _build_script() -> ModuleType:
    """guests/build.py, under a name that hides no package."""
    spec = importlib.util.spec_from_file_location("guests_build", guestlib.folder() / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hello_is_first_and_all_that_were_promised_are_there() -> None:
    assert NAMES[0] == "hello"
    assert set(NAMES) >= {
        "hello", "exits", "real-mode", "protected-mode", "long-mode", "exceptions", "ring3", "smp",
        "smp-sipi", "virtio", "c-guest",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_guest_is_complete(name: str) -> None:
    guest = guestlib.find(name)
    assert guest.name == name and guest.summary
    assert guest.image.is_file() and guest.source is not None and guest.source.is_file()
    assert guest.readme.startswith(f"# {name}\n")
    assert guest.expected_output and guest.expected_reason in pykvm.result.REASONS
    assert (guest.expected_code is None) == (guest.expected_reason != pykvm.result.DEBUG_EXIT)


@pytest.mark.parametrize("name", NAMES)
def test_guest_toml_has_no_field_that_nobody_reads(name: str) -> None:
    said = tomllib.loads((guestlib.folder() / name / "guest.toml").read_text())
    assert set(said) <= {"summary", "machine", "enter", "run", "expect"}
    assert set(said["expect"]) <= {"reason", "code"}


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_shows_the_output_that_is_checked(name: str) -> None:
    guest = guestlib.find(name)
    for line in (guest.expected_output or "").splitlines():
        assert f"    {line}\n" in guest.readme


@pytest.mark.parametrize("name", NAMES)
def test_the_overview_lists_the_guest(name: str) -> None:
    assert f"| [{name}]({name}) |" in (guestlib.folder() / "README.md").read_text()


@pytest.mark.parametrize("name", ASSEMBLED)
def test_the_committed_image_is_what_the_source_assembles_to(name: str) -> None:
    guest = guestlib.find(name)
    assert guest.source is not None and guest.mode is not None and guest.at is not None
    built = asm_file(guest.source, guest.mode, at=guest.at)  # type: ignore[arg-type]
    assert guest.image.read_bytes() == built, "run guests/build.py"


@pytest.mark.parametrize("name", IN_C)
def test_the_committed_elf_was_built_from_the_sources_there_are(name: str) -> None:
    guest = guestlib.find(name)
    committed = (guest.path / "sources.sha256").read_text().strip()
    assert _build_script().digest(guest) == committed, "run guests/build.py"


@pytest.mark.parametrize("name", IN_C)
def test_a_committed_elf_is_small_and_tells_nothing_about_who_built_it(name: str) -> None:
    guest = guestlib.find(name)
    data = guest.data()
    assert len(data) < 10240
    assert os.fsencode(guestlib.folder()) not in data and b"/tmp/" not in data
    image = elf.parse(data)
    assert image.mode == "long64" and image.segments[0].gpa == 0x100000
    assert {"_start", "main", "stack_top"} <= set(image.symbols)


def test_hello_is_a_few_dozen_bytes() -> None:
    assert len(guestlib.find("hello").data()) <= 36


def test_data_is_the_image_without_any_toolchain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in NAMES:
        assert guestlib.find(name).data()


def test_an_unknown_guest_names_the_known_ones() -> None:
    with pytest.raises(LookupError, match="'helo'; there are hello, "):
        guestlib.find("helo")


def test_a_name_with_a_path_in_it_is_no_guest() -> None:
    with pytest.raises(LookupError):
        guestlib.find("../guests/hello")


def test_the_folder_inside_an_installed_package_is_preferred(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "pykvm"
    package.mkdir()
    monkeypatch.setattr(guestlib, "__file__", str(package / "guestlib.py"))
    with pytest.raises(FileNotFoundError, match="guests folder"):
        guestlib.folder()
    shutil.copytree(guestlib_folder, tmp_path / "guests")
    assert guestlib.folder() == tmp_path / "guests"
    shutil.copytree(guestlib_folder, package / "guests")
    assert guestlib.folder() == package / "guests"
    assert guestlib.find("hello").image == package / "guests" / "hello" / "hello.bin"


guestlib_folder = guestlib.folder()


# -- resolve: what `pykvm run` is given ----------------------------------------------------------


def test_a_shipped_name_resolves_with_its_own_settings() -> None:
    guest = guestlib.resolve("smp")
    assert (guest.mode, guest.at, guest.cpus, guest.timeout) == ("long64", 0x8000, 4, 20.0)


def test_what_the_caller_says_wins() -> None:
    guest = guestlib.resolve("smp", mode="prot32", at=0x9000, memory="8M", timeout=1.5)
    assert (guest.mode, guest.at, guest.memory, guest.timeout) == ("prot32", 0x9000, "8M", 1.5)


def _file(folder: Path, name: str, data: bytes) -> str:
    file = folder / name
    file.write_bytes(data)
    return str(file)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [(None, ("long64", 0x8000)), ("real16", ("real16", 0x7C00)), ("prot32", ("prot32", 0x8000))],
)
def test_a_flat_file(tmp_path: Path, mode: str | None, expected: tuple[str, int]) -> None:
    guest = guestlib.resolve(_file(tmp_path, "guest.img", b"\xf4"), mode=mode)
    assert (guest.mode, guest.at) == expected
    assert guest.data() == b"\xf4"
    assert guest.source is None and guest.expected_output is None and guest.readme == ""


def test_a_source_file_is_assembled_for_its_address(tmp_path: Path) -> None:
    file = _file(tmp_path, "guest.S", b"mov eax, [value]\nvalue: .long 7\n")
    guest = guestlib.resolve(file, mode="prot32", at=0x9000)
    assert guest.data() == bytes.fromhex("a1 05 90 00 00 07 00 00 00")
    assert guest.source == Path(file)


def test_an_elf_is_known_by_its_first_bytes_and_says_its_mode_itself(tmp_path: Path) -> None:
    guest = guestlib.resolve(_file(tmp_path, "whatever", guestlib.find("c-guest").data()))
    assert (guest.mode, guest.at) == (None, None)


def test_neither_a_guest_nor_a_file(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"nothing\.bin.*the guests are hello"):
        guestlib.resolve(str(tmp_path / "nothing.bin"))


def test_a_file_does_not_hide_a_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _file(tmp_path, "hello", b"\xf4")
    monkeypatch.chdir(tmp_path)
    assert guestlib.resolve("hello").summary
    assert guestlib.resolve("./hello").data() == b"\xf4"


# -- guests in C ---------------------------------------------------------------------------------

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


@needs_gcc
def test_build_c_gives_an_elf_and_leaves_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    source = tmp_path / "mine.c"
    source.write_text('#include "pykvm_guest.h"\nint main(void) { return 7; }\n')
    built = guestlib.build_c([source], tmp_path / "mine.elf")
    assert (tmp_path / "mine.elf").read_bytes() == built
    assert elf.parse(built).entry == 0x100000
    assert list(scratch.iterdir()) == []


@needs_gcc
def test_build_c_passes_on_what_the_compiler_says(tmp_path: Path) -> None:
    source = tmp_path / "mine.c"
    source.write_text("int main(void) { return missing; }\n")
    with pytest.raises(AsmError, match=r"mine\.c:1:.*missing"):
        guestlib.build_c([source])
    source.write_text("int f(void);\nint main(void) { return f(); }\n")
    with pytest.raises(AsmError, match="undefined reference to `f'"):
        guestlib.build_c([source])


def test_build_c_without_a_compiler_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AsmError, match="apt install gcc"):
        guestlib.build_c(["mine.c"])


@needs_gcc
@pytest.mark.parametrize("name", IN_C)
def test_the_makefile_makes_the_same_bytes_as_build_c(name: str, tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    guest = guestlib.find(name)
    shutil.copytree(guestlib.folder() / "include", tmp_path / "include")
    folder = tmp_path / name
    folder.mkdir()
    for file in ("Makefile", "main.c"):
        shutil.copy(guest.path / file, folder)
    subprocess.run(["make", "-s"], cwd=folder, check=True, timeout=100)
    assert (folder / f"{name}.elf").read_bytes() == guestlib.build_c([guest.path / "main.c"])


def test_a_guest_says_what_it_is() -> None:
    assert repr(guestlib.find("hello")).startswith("<Guest hello: ")
    file = Path("/nowhere/x.bin")
    assert repr(Guest("x.bin", file, file)) == "<Guest x.bin: /nowhere/x.bin>"
