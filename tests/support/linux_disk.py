"""A root file system on an ext4 image for a stock kernel, and an initrd that goes over to it."""

from __future__ import annotations

import functools
import gzip
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

INITRD = r"""#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev
for module in /modules/*.ko; do $b insmod "$module"; done
$b mount -t ext4 /dev/vda /root || $b poweroff -f
$b mount -o move /dev /root/dev
exec $b switch_root /root /sbin/init
"""

INIT = r"""#!/bin/busybox sh
export PATH=/bin:/sbin:/usr/bin
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
exec </dev/console >/dev/console 2>&1
echo "MARKER root $(busybox grep ' / ' /proc/mounts)"
. /test.sh
echo "MARKER end"
busybox mount -o remount,ro /
busybox poweroff -f
"""

#: What a kernel needs for every disk here, in the order of loading.
MODULES = ("virtio_mmio", "virtio_pci", "virtio_blk", "virtio_rng")

SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def tool(name: str) -> str:
    """The path of a program; a test that needs it is skipped where there is none."""
    found = shutil.which(name, path=SYSTEM_PATH)
    if found is None:
        pytest.skip(f"no {name} in $PATH")
    return found


def run(*command: str | Path) -> str:
    """What it prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@functools.cache
def initrd(kernel: Path) -> bytes:
    """Busybox, the kernel's modules with all they depend on, and the script above.

    Args:
        kernel: ``…/boot/vmlinuz-RELEASE``; its modules are in ``…/lib/modules/RELEASE``.
    """
    from tests.rig.initramfs import ModuleTree, cpio

    folder = kernel.parents[1] / "lib" / "modules" / kernel.name.removeprefix("vmlinuz-")
    tree = ModuleTree(folder)
    entries = [(name, 0o040755, b"") for name in ("bin", "dev", "modules", "root")]
    entries += [
        ("bin/busybox", 0o100755, Path(tool("busybox")).read_bytes()),
        ("init", 0o100755, INITRD.encode()),
    ]
    for number, name in enumerate(tree.closure(MODULES)):
        entries.append((f"modules/{number:03}-{name}.ko", 0o100644, tree.read(name)))
    return gzip.compress(b"".join(cpio(entries)), 1)


def root_image(
    path: Path,
    size: int,
    script: str,
    programs: Iterable[str] = (),
    files: Mapping[str, str] | None = None,
) -> None:
    """Make an ext4 image whose init runs ``script``.

    Args:
        path: of the image.
        size: in bytes.
        script: for busybox sh; it is ``/test.sh``.
        programs: of this host, put into /usr/bin with their libraries.
        files: more of them, by name, with their contents.
    """
    tree = path.with_suffix(".tree")
    for name in ("bin", "dev", "proc", "sys", "sbin", "usr/bin", "out"):
        (tree / name).mkdir(parents=True)
    shutil.copy(tool("busybox"), tree / "bin" / "busybox")
    (tree / "sbin" / "init").write_text(INIT)
    (tree / "sbin" / "init").chmod(0o755)
    (tree / "test.sh").write_text(script)
    for name, text in (files or {}).items():
        (tree / name).write_text(text)
    for program in programs:
        _install(tree, tool(program))
    with path.open("xb") as file:
        file.truncate(size)
    options = ("-q", "-t", "ext4", "-O", "^has_journal" if size < 8 << 20 else "has_journal")
    run(tool("mke2fs"), *options, "-d", tree, path)
    shutil.rmtree(tree)


def _install(tree: Path, program: str) -> None:
    shutil.copy(program, tree / "usr" / "bin")
    # "libm.so.6 => /lib/…/libm.so.6 (0x…)", and the loader without an arrow
    for library in re.findall(r"(/\S+) \(0x", run(tool("ldd"), program)):
        target = tree / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)


def check(image: Path) -> None:
    """Nothing is wrong with the file system, and nothing has to be replayed."""
    text = run(tool("e2fsck"), "-fn", image)
    assert "clean" not in text or "not cleanly" not in text, text


def read_file(image: Path, name: str) -> bytes:
    """A file of the image, read on the host."""
    out = image.with_suffix(".file")
    run(tool("debugfs"), "-R", f"dump {name} {out}", image)
    return out.read_bytes()
