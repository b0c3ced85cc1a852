"""An initrd in which a stock kernel meets virtio devices, without a disk."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path

from tests.support.linux_disk import tool

INIT = r"""#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
exec </dev/console >/dev/console 2>&1
for module in /modules/*.ko; do $b insmod "$module"; done
. /test.sh
echo "MARKER end"
$b poweroff -f
"""


def initrd(kernel: Path, modules: Iterable[str], script: str) -> bytes:
    """Busybox, modules with all they depend on, and a script for its shell.

    Args:
        kernel: ``…/boot/vmlinuz-RELEASE``; its modules are in ``…/lib/modules/RELEASE``.
        modules: by name; those that the kernel has built in are left out.
        script: what is run when they are loaded; ``$b`` is busybox.
    """
    from tests.rig.initramfs import ModuleTree, cpio

    folder = kernel.parents[1] / "lib" / "modules" / kernel.name.removeprefix("vmlinuz-")
    tree = ModuleTree(folder)
    entries = [(name, 0o040755, b"") for name in ("bin", "dev", "modules", "proc", "sys")]
    entries += [
        ("bin/busybox", 0o100755, Path(tool("busybox")).read_bytes()),
        ("init", 0o100755, INIT.encode()),
        ("test.sh", 0o100644, script.encode()),
    ]
    for number, name in enumerate(tree.closure(modules)):
        entries.append((f"modules/{number:03}-{name}.ko", 0o100644, tree.read(name)))
    return gzip.compress(b"".join(cpio(entries)), 1)
