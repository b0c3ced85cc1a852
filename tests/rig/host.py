"""What the rig needs of the host: QEMU, busybox, a Debian kernel; found, or installed.

Everything is kept in one cache folder, under a lock, so that runs beside each other do not
disturb each other. Nothing outside that folder is written, except the packages that apt installs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Debian's metapackage; it depends on the newest kernel of the release.
KERNEL_METAPACKAGE = "linux-image-amd64"

#: Another flavour, for the tests that boot kernels; the folder in the cache that it gets.
CLOUD_METAPACKAGE, CLOUD_FOLDER = "linux-image-cloud-amd64", "cloud"

#: program → the Debian package it comes from
HOST_PROGRAMS = {"qemu-system-x86_64": "qemu-system-x86", "busybox": "busybox-static"}


class RigError(Exception):
    """The rig itself failed, as opposed to what ran inside it."""


@dataclass(frozen=True)
class KernelImage:
    """An unpacked Debian kernel package."""

    vmlinuz: Path
    modules: Path  # .../lib/modules/RELEASE

    @property
    def release(self) -> str:
        """As ``uname -r`` will say inside: ``6.1.0-37-amd64``."""
        return self.modules.name


def default_cache() -> Path:
    """$PYKVM_RIG_DIR, or ``pykvm/rig`` in the user's cache folder."""
    if chosen := os.environ.get("PYKVM_RIG_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pykvm" / "rig"


@contextlib.contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Hold the cache folder for this process; others wait here."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(*command: str, cwd: Path | None = None) -> str:
    """Run to the end; its standard output, or a RigError with what it printed."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError as error:
        raise RigError(
            f"{command[0]} is not installed: the rig needs a Debian-like host"
        ) from error
    if done.returncode:
        raise RigError(f"{' '.join(command)} failed ({done.returncode}):\n{done.stderr.strip()}")
    return done.stdout


def _is_static_busybox() -> bool:
    """Whether the busybox here runs without libraries, as it must in an initramfs."""
    path = shutil.which("busybox")
    # A static ELF names no interpreter.
    return path is not None and b"/ld-linux" not in Path(path).read_bytes()


def missing_packages() -> list[str]:
    """Debian packages still to be installed."""
    missing = [package for name, package in HOST_PROGRAMS.items() if not shutil.which(name)]
    if "busybox-static" not in missing and not _is_static_busybox():
        missing.append("busybox-static")
    return missing


def install_programs() -> None:
    """Install what is missing, as root; otherwise say what to install."""
    missing = missing_packages()
    if not missing:
        return
    command = f"apt-get install --no-install-recommends {' '.join(missing)}"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise RigError(f"the rig needs {', '.join(missing)}; install with: sudo {command}")
    _run("apt-get", "update", "-qq")
    _run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing)
    if still := missing_packages():
        raise RigError(f"installed, yet still missing: {', '.join(still)}")


def find_kernel(cache: Path, folder: str = "kernel") -> KernelImage | None:
    """The kernel in the cache, or None."""
    boot, modules = cache / folder / "boot", cache / folder / "lib" / "modules"
    for vmlinuz in sorted(boot.glob("vmlinuz-*")):
        found = KernelImage(vmlinuz, modules / vmlinuz.name.removeprefix("vmlinuz-"))
        if found.modules.is_dir():
            return found
    return None


def fetch_kernel(
    cache: Path, metapackage: str = KERNEL_METAPACKAGE, folder: str = "kernel"
) -> KernelImage:
    """Download Debian's kernel package and unpack it into the cache; nothing is installed."""
    if os.geteuid() == 0:
        _run("apt-get", "update", "-qq")
    depends = _run("apt-cache", "depends", metapackage)
    names = [line.split()[-1] for line in depends.splitlines() if "Depends: linux-image" in line]
    if not names:
        raise RigError(f"apt knows no {metapackage}: run apt-get update, on Debian")
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as scratch:
        _run(
            "apt-get",
            "-o",
            "APT::Sandbox::User=root",
            "download",
            "-qq",
            names[0],
            cwd=Path(scratch),
        )
        (package,) = Path(scratch).glob("*.deb")
        _run("dpkg", "-x", str(package), f"{scratch}/unpacked")
        shutil.rmtree(cache / folder, ignore_errors=True)
        os.rename(f"{scratch}/unpacked", cache / folder)  # whole or not at all
    kernel = find_kernel(cache, folder)
    if kernel is None:
        raise RigError(f"{names[0]} holds no kernel with its modules")
    return kernel


#: Of the environment, what would keep bytecode from where it is looked for, or asks for reports.
_OF_THE_RUN = ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "PYTEST_ADDOPTS")


def compile_ahead(checkout: Path, tests: Sequence[str]) -> None:
    """Leave compiled what is of the checkout, and the ``tests`` as pytest has them.

    Emulated, Python compiles pykvm longer than it runs it, and what is started inside would each
    time: the checkout may be read-only there. Whatever goes wrong here is told better inside.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _OF_THE_RUN}
    collect = ("pytest", "--collect-only", "-qq", "-p", "no:cacheprovider", *tests)
    for module in (("compileall", "-qq", "pykvm", "tests", "benches"), *([collect] * bool(tests))):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                [sys.executable, "-m", *module],
                cwd=checkout,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=120,
            )
