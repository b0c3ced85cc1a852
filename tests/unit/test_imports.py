"""The layers of the package hold, and importing it stays cheap."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.imports import imports_of, wrong_imports

PACKAGE = Path(__file__).resolve().parents[2] / "pykvm"

#: Costly modules of the standard library, and what belongs to other storeys.
# fmt: off
HEAVY = {
    "argparse", "ast", "asyncio", "click", "collections.abc", "concurrent", "contextlib",
    "ctypes", "dataclasses", "enum", "fcntl", "functools", "importlib.metadata", "inspect",
    "json", "logging", "numpy", "pathlib", "pickle", "re", "rich", "shutil", "signal", "socket",
    "struct", "subprocess", "tempfile", "threading", "traceback", "typing",
}
# fmt: on


def test_imports_point_down_the_storeys() -> None:
    assert wrong_imports(PACKAGE) == []


def test_the_walk_sees_the_package() -> None:
    seen = {found.module for found in imports_of(PACKAGE)}
    assert {"kvm.system", "memory.guest_memory", "machine"} <= seen


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small package with the folders of the real one, and nothing wrong in it."""
    root = tmp_path / "pkg"
    for name in ("_abi", "kvm", "memory", "devices", "arch", "boot", "cli"):
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").touch()
    (root / "__init__.py").write_text("from pkg.machine import Machine\n")
    (root / "errors.py").touch()
    (root / "machine.py").write_text(
        "from .kvm import vm\nfrom . import devices\nimport pkg.arch\n"
    )
    (root / "kvm" / "vm.py").write_text("from pkg._abi import lib\nfrom ..errors import E\n")
    (root / "cli" / "main.py").write_text("import click\nfrom pkg import Machine\n")
    assert wrong_imports(root) == []
    return root


@pytest.mark.parametrize(
    ("where", "statement", "complaint"),
    [
        ("kvm/vm.py", "import pkg.machine", "pkg.kvm.vm:1 imports pkg.machine, which stands above"),
        ("kvm/vm.py", "from pkg import machine", "imports pkg.machine, which stands above it"),
        ("kvm/vm.py", "from .. import machine as m", "imports pkg.machine, which stands above it"),
        ("kvm/__init__.py", "from ..machine import Machine", "pkg.kvm:1 imports pkg.machine"),
        ("errors.py", "from ._abi import lib", "imports pkg._abi, which stands above it"),
        ("kvm/vm.py", "from pkg import Machine", "pkg.kvm.vm:1 imports pkg, which stands above it"),
        ("machine.py", "def f():\n    from .cli import main", "pkg.machine:2 imports pkg.cli.main"),
        ("new.py", "import pkg.cli", "pkg.new:1 imports pkg.cli, which stands above it"),
        ("new.py", "from pkg._abi import ffi", "imports pkg._abi, which only kvm, memory"),
        ("boot/elf.py", "from .._abi import lib", "imports pkg._abi, which only kvm, memory"),
        ("devices/serial.py", "from pkg.kvm import vm", "devices must not know kvm"),
        ("boot/elf.py", "import pkg.kvm.vm", "boot must not know kvm"),
        ("arch/regs.py", "from pkg.kvm import Vcpu", "arch must not know kvm"),
        ("machine.py", "import rich.console", "imports rich, which only the command line may"),
        ("machine.py", "from click import command", "imports click, which only the command line"),
        ("machine.py", "try:\n    import click\nexcept ImportError:\n    pass", "imports click"),
        ("machine.py", "if not TYPE_CHECKING:\n    import click", "imports click"),
    ],
)
def test_a_wrong_import_is_found(tree: Path, where: str, statement: str, complaint: str) -> None:
    (tree / where).write_text(f"{statement}\n")
    (found,) = wrong_imports(tree)
    assert complaint in found


@pytest.mark.parametrize(
    "statement",
    [
        "if TYPE_CHECKING:\n    from pkg.machine import Machine",
        "import typing\nif typing.TYPE_CHECKING:\n    from pkg.machine import Machine",
        "from . import vm",
        "from pkg.memory import x",
        "from pkg._abi import lib, ffi",
    ],
)
def test_an_import_that_is_right_or_never_executed_is_left_alone(
    tree: Path, statement: str
) -> None:
    (tree / "kvm" / "more.py").write_text(f"{statement}\n")
    assert wrong_imports(tree) == []


def _loaded_by(statement: str) -> set[str]:
    """Modules that the statement loads in a fresh interpreter, which itself loads few."""
    script = (
        f"import sys; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}; {script}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    return set(done.stdout.split())


def test_import_pykvm_loads_nothing_heavy() -> None:
    loaded = _loaded_by("import pykvm")
    assert "pykvm.machine" in loaded
    assert sorted(loaded & HEAVY) == []


def test_what_only_some_scripts_need_is_not_loaded_with_the_package() -> None:
    loaded = _loaded_by("import pykvm")
    lazy = ("assembler", "pool", "smp", "doctor", "cli", "guestlib", "diagnose", "kvm.tracing")
    assert sorted(loaded & {f"pykvm.{name}" for name in lazy}) == []


def test_a_heavy_import_would_be_seen() -> None:
    assert {"re", "enum"} <= _loaded_by("import logging")
