"""What is shipped: sdist, wheel, editable install, and what the build says when it cannot.

Everything happens in a copy of the checkout, without the network: the build tools and cffi are
those of the running environment.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from pykvm._abi import ffi, lib
from tests.support import plain

ROOT = Path(__file__).parents[2]
GIL_DISABLED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
PARTS = ("csrc", "guests", "pykvm", "tests/unit", "benches", "docs", ".ci")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md")
LITTER = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc", "*.o")

LIMIT = 200
"""Seconds for one command; a compiler on a slow machine needs many."""
pytestmark = pytest.mark.watchdog(2 * LIMIT)

pytest.importorskip("setuptools", minversion="77", reason="setuptools >= 77 is not installed")


def copy_of_the_checkout(folder: Path) -> Path:
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / part, ignore=LITTER, dirs_exist_ok=True)
    for name in FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    return folder


def python(
    *arguments: str | Path, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run this Python; CC and the PYKVM_* switches of the outer build do not reach it."""
    clean = {
        name: value
        for name, value in plain.environment().items()
        if name not in ("CC", "CFLAGS", "PYTHONPATH") and not name.startswith("PYKVM_")
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )


def hook(name: str, source: Path, output: Path, **environment: str) -> Path:
    """Call a PEP 517 hook as pip does, and return the file it made."""
    code = f"import setuptools.build_meta as b; print('made', b.{name}({str(output)!r}))"
    result = python("-c", code, cwd=source, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return output / result.stdout.strip().splitlines()[-1].removeprefix("made ")


def without_compiler(folder: Path) -> str:
    """Return a PATH on which there is no compiler, but a Python."""
    folder.mkdir()
    (folder / "python3").symlink_to(sys.executable)
    return str(folder)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_the_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    return hook("build_sdist", checkout, folder, PATH=without_compiler(folder / "bin"))


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    # Not tarfile: what its filter is called depends on the patch release of Python.
    subprocess.run(["tar", "-xf", str(sdist), "-C", str(folder)], check=True, timeout=LIMIT)
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hook("build_wheel", unpacked, tmp_path_factory.mktemp("wheel"), PYKVM_WERROR="1")


def files_below(folder: Path, root: Path) -> set[str]:
    return {
        str(path.relative_to(root))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".so", ".o")
    }


def test_sdist_needs_no_compiler_and_holds_all_sources(checkout: Path, unpacked: Path) -> None:
    held = files_below(unpacked, unpacked)
    for part in ("csrc", "guests", "pykvm", "tests/unit"):
        expected = files_below(checkout / part, checkout)
        assert expected
        assert expected <= held
    assert {"setup.py", "pyproject.toml", "LICENSE"} <= held
    assert not [name for name in held if name.endswith((".so", ".pyc", ".o"))]


def test_wheel_is_tagged_for_every_later_python(wheel: Path) -> None:
    if GIL_DISABLED:
        assert "-abi3-" not in wheel.name
        return
    assert re.fullmatch(r"pykvm_vmm-[0-9.]+-cp311-abi3-linux_x86_64\.whl", wheel.name)


def test_wheel_holds_the_package_the_guests_and_nothing_else(checkout: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if ".dist-info/" not in name}
    guests = {f"pykvm/{name}" for name in files_below(checkout / "guests", checkout)}
    assert guests <= package
    extension = "pykvm/_abi/_native.abi3.so"
    sources = {name for name in files_below(checkout / "pykvm", checkout) if name.endswith(".py")}
    assert sources | {"pykvm/py.typed", "pykvm/_abi/_native.pyi"} <= package
    compiled = {name for name in package if name.endswith(".so")}
    assert len(compiled) == 1
    assert compiled == {extension} or GIL_DISABLED
    assert {name.partition("/")[0] for name in package} == {"pykvm"}


def test_wheel_installs_and_runs_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    path = without_compiler(tmp_path / "bin")
    result = python(
        *("-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel),
        cwd=tmp_path,
        PATH=path,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    code = (
        "import pykvm, pykvm._abi as a;"
        "print(pykvm.__file__, a.lib.KVM_GET_API_VERSION, a.lib.pykvm_ioctl(-1, 0, a.ffi.NULL))"
    )
    result = python("-c", code, cwd=tmp_path, PATH=path, PYTHONPATH=str(tmp_path / "site"))
    assert result.stdout.split() == [
        str(tmp_path / "site" / "pykvm" / "__init__.py"),
        str(0xAE00),
        "-9",  # -EBADF
    ], result.stderr


def test_editable_install_uses_the_checkout_by_a_plain_path(tmp_path: Path) -> None:
    """A path in a .pth file, not an import hook, which would cost every start of this Python."""
    source = copy_of_the_checkout(tmp_path / "checkout")
    before = files_below(source, source)
    venv.create(tmp_path / "venv", with_pip=False)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    inner = tmp_path / "venv" / "bin" / "python"
    result = python(
        *("-m", "pip", "--python", inner, "install", "--no-deps", "--no-index"),
        *("--no-build-isolation", "-e", source),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    [pth] = site.glob("__editable__*.pth")
    assert pth.read_text().strip() == str(source)
    code = "import pykvm._abi; print(pykvm._abi.__file__)"
    output = subprocess.run(
        [inner, "-c", code], cwd="/", capture_output=True, text=True, timeout=LIMIT
    )
    assert output.stdout.strip() == str(source / "pykvm" / "_abi" / "__init__.py"), output.stderr
    assert not (source / "pykvm" / "guests").exists()
    left = files_below(source, source) - before
    assert {name.partition("/")[0] for name in left} <= {"build", "pykvm_vmm.egg-info"}


def test_build_without_a_compiler_says_what_to_install(tmp_path: Path) -> None:
    source = copy_of_the_checkout(tmp_path / "checkout")
    result = python(
        *("setup.py", "build_ext", "--inplace"),
        cwd=source,
        PATH=without_compiler(tmp_path / "bin"),
    )
    assert result.returncode != 0
    assert "pykvm needs a C compiler, and there is no 'gcc' here" in result.stderr
    assert "apt install gcc" in result.stderr
    assert "Traceback" not in result.stderr


def test_module_that_was_not_built_says_how_to_build_it(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "pykvm", tmp_path / "pykvm", ignore=LITTER)
    result = python("-c", "import pykvm._abi", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    message = result.stderr.splitlines()[-3:]
    assert message[0].startswith("ImportError: pykvm's compiled module cannot be loaded:")
    assert "pip install -e ." in message[1]


def test_sanitized_build_is_sanitized(tmp_path: Path) -> None:
    source = copy_of_the_checkout(tmp_path / "checkout")
    result = python(*("setup.py", "build_ext", "--inplace"), cwd=source, PYKVM_SANITIZE="1")
    assert result.returncode == 0, result.stdout + result.stderr
    [module] = (source / "pykvm" / "_abi").glob("_native*.so")
    ldd = subprocess.run(["ldd", module], capture_output=True, text=True, check=True, timeout=LIMIT)
    needed = ldd.stdout
    assert "libasan" in needed
    assert "libubsan" in needed


def test_stub_declares_the_functions_of_the_module() -> None:
    stub = (ROOT / "pykvm" / "_abi" / "_native.pyi").read_text()
    declared = dict(re.findall(r"def (pykvm_\w+)\(\s*self(?:,\s+([^)]*))?\)", stub))
    functions = {name for name in dir(lib) if name.startswith("pykvm_")}
    assert set(declared) == functions
    for name, parameters in declared.items():
        count = len([part for part in parameters.split(",") if part.strip(" /\n")])
        assert count == len(ffi.typeof(ffi.addressof(lib, name)).args), name


def test_stub_declares_only_what_cffi_has() -> None:
    stub = (ROOT / "pykvm" / "_abi" / "_native.pyi").read_text()
    body = stub[stub.index("class _FFI") :]
    names = re.findall(r"^    (?:def )?(\w+)[(:]", body, re.M)
    assert len(names) > 20
    assert [name for name in names if not hasattr(ffi, name)] == []
