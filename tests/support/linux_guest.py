"""A stock kernel and a busybox to boot: what the tests of booting run, and where it comes from."""

from __future__ import annotations

import functools
import gzip
import os
import shutil
import time
from pathlib import Path

import pytest

INIT = r"""#!/bin/busybox sh
busybox mount -t proc proc /proc
busybox mount -t devtmpfs dev /dev
exec </dev/console >/dev/console 2>&1
echo "MARKER up $(busybox uname -r)"
busybox grep -E '^(processor|model name|siblings|cpu cores)' /proc/cpuinfo
for word in $(busybox cat /proc/cmdline); do
    case $word in
    do=echo) echo "type something"; read -r line; echo "typed: <$line>"; busybox poweroff -f ;;
    do=poweroff) busybox poweroff -f ;;
    do=reboot) busybox reboot -f ;;
    do=panic) echo c >/proc/sysrq-trigger ;;
    do=hang) while :; do :; done ;;
    esac
done
busybox sleep 1000
"""


def kernels(folder: str | Path | None = None) -> dict[str, Path]:
    """Debian kernels by flavour, "generic" and "cloud".

    In a folder, by default the one that ``PYKVM_KERNELS`` names: ``tests/rig`` fetches them and
    sets it.
    """
    folder = folder or os.environ.get("PYKVM_KERNELS")
    found: dict[str, Path] = {}
    if folder:
        for pattern in ("vmlinuz-*", "*/boot/vmlinuz-*"):
            for image in sorted(Path(folder).glob(pattern)):
                found["cloud" if "cloud" in image.name else "generic"] = image
    return found


def initrd(init: str = INIT) -> bytes:
    """A gzipped cpio of busybox and a script, by default the one above."""
    from tests.rig.initramfs import cpio

    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("no busybox to put into an initrd")
    entries = [(name, 0o040755, b"") for name in ("bin", "dev", "proc")]
    entries += [
        ("bin/busybox", 0o100755, Path(busybox).read_bytes()),
        ("init", 0o100755, init.encode()),
    ]
    return gzip.compress(b"".join(cpio(entries)), 1)


@functools.cache
def ring0_is_native() -> bool:
    """Whether this KVM executes ring 0 at the processor's speed: half a million instructions tell.

    They take 0.35 s where KVM emulates them, and some milliseconds where even the processor is
    emulated; on a busy machine maybe at the third attempt.
    """
    import pykvm

    with pykvm.Machine("2M") as m:
        m.load(pykvm.asm("mov ecx,250000; l: dec ecx; jnz l; hlt"), at=0x8000)
        for _ in range(3):
            m.cpu.enter("long64", entry=0x8000)
            began = time.monotonic()
            m.run(timeout=60)
            if time.monotonic() - began < 0.1:
                return True
    return False


def need_native_ring0() -> None:
    """Skip the test where a stock kernel would take minutes."""
    if not ring0_is_native():
        pytest.skip("half a million instructions in ring 0 took over 0.1 s: it is emulated")
