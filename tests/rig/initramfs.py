"""The first file system of the rig's kernel: busybox, the modules, and a script.

A Debian kernel has its drivers as modules. Those that the rig needs, with what they depend on, are
put into a cpio archive in the order of loading, so nothing of the host's /lib/modules is touched.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from .host import KernelImage, RigError

#: virtio over PCI, the host's file system by 9p, an overlay over it; and what it is all for.
BASE_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "kvm_amd")

STAGE1 = Path(__file__).with_name("stage1.sh")


class ModuleTree:
    """Kernel modules by name, with what each depends on.

    Read from the modules' own ``.modinfo`` sections, so that no depmod is needed.
    """

    def __init__(self, folder: Path) -> None:
        self._paths: dict[str, Path] = {}
        for path in folder.rglob("*.ko*"):
            self._paths[self._name(path.name.split(".ko")[0])] = path
        if not self._paths:
            raise RigError(f"no kernel modules under {folder}")

    @staticmethod
    def _name(name: str) -> str:
        return name.replace("-", "_")  # the kernel holds them for the same

    def read(self, name: str) -> bytes:
        """The module's ELF file, unpacked."""
        path = self._paths.get(self._name(name))
        if path is None:
            raise RigError(f"this kernel has no module {name!r}")
        data = path.read_bytes()
        return lzma.decompress(data) if path.suffix == ".xz" else data

    def _needs(self, name: str) -> list[str]:
        data = self.read(name)
        hard = re.findall(rb"\0depends=([^\0]*)\0", data)
        soft = re.findall(rb"\0softdep=pre: ([^\0]*)\0", data)
        found = (self._called(n) for text in soft for n in text.decode().split())
        return [n for text in hard for n in text.decode().split(",") if n] + [n for n in found if n]

    def _called(self, name: str) -> str:
        """The module of that name or alias; "" where there is none, as what it means is built in.

        Of several (crc32c in C, by an instruction, …) a generic one, which works on every CPU.
        """
        if self._name(name) in self._paths:
            return name
        mark = f"\0alias={name}\0".encode()
        others = [other for other in self._paths if mark in self.read(other)]
        return min(others, key=lambda other: ("generic" not in other, other), default="")

    def closure(self, names: Iterable[str]) -> list[str]:
        """The named modules and all they depend on, each after what it depends on."""
        ordered: list[str] = []

        def visit(name: str) -> None:
            name = self._name(name)
            if name not in ordered:
                for needed in self._needs(name):
                    visit(needed)
                ordered.append(name)

        for name in names:
            visit(name)
        return ordered


def cpio(entries: Iterable[tuple[str, int, bytes]]) -> Iterator[bytes]:
    """A "newc" archive of ``(path, mode, content)``, in pieces.

    Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    for inode, (path, mode, data) in enumerate((*entries, ("TRAILER!!!", 0, b"")), start=1):
        name = path.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
        yield head + bytes(-len(head) % 4)
        yield data + bytes(-len(data) % 4)


def build(kernel: KernelImage, modules: Iterable[str], cache: Path) -> Path:
    """Make the initramfs for ``kernel`` with ``modules``, or take the one made before."""
    busybox = Path(shutil.which("busybox") or "/bin/busybox").read_bytes()
    tree = ModuleTree(kernel.modules)
    entries = [(name, 0o040755, b"") for name in ("bin", "dev", "modules", "new", "proc", "host")]
    entries += [
        ("bin/busybox", 0o100755, busybox),
        ("init", 0o100755, STAGE1.read_bytes()),
    ]
    # insmod in this order: the number keeps it in a glob
    for number, name in enumerate(tree.closure((*BASE_MODULES, *modules))):
        entries.append((f"modules/{number:03}-{name}.ko", 0o100644, tree.read(name)))
    archive = b"".join(cpio(entries))
    path = cache / f"initramfs-{hashlib.sha256(archive).hexdigest()[:16]}.cpio"
    if not path.exists():
        for old in cache.glob("initramfs-*"):  # of other modules or another kernel
            if old.stat().st_mtime < time.time() - 86400:
                old.unlink()
        scratch = path.with_suffix(".tmp")
        scratch.write_bytes(archive)
        os.replace(scratch, path)
    return path
