"""A booted Debian, snapshotted to a file, goes on in another process: console, disk and time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pykvm
from pykvm import result as reasons
from pykvm.virtio import Rng
from tests.support import linux_disk, linux_guest

BOOT_SECONDS = 300.0

SCRIPT = r"""
echo "MARKER ready"
while read -r line; do
    echo "answer <$line> after <$(busybox cat /out/seen 2>/dev/null)> at $(busybox date +%s)"
    echo "$line" >/out/seen
    busybox sync; echo "written"
    [ "$line" = end ] && break
done
busybox dd if=/dev/hwrng bs=16 count=1 2>/dev/null | busybox wc -c
"""

GO_ON = """
import sys
import pykvm
from pykvm.virtio import Rng

path, image, transport = sys.argv[1:]

def setup(m):
    m.disk(image, transport=transport)
    m.virtio(Rng(), transport=transport)

with pykvm.Snapshot.load(path) as s, s.fork(setup) as m, m.start(timeout=300) as running:
    m.console.write(b"two\\n")
    print(m.console.expect(b" at ", 300).decode())
    m.console.write(b"end\\n")
    result = running.wait(300)
    print(m.console.transcript.decode())
    print("RESULT", result.reason)
"""


@pytest.mark.watchdog(900)
@pytest.mark.parametrize(("transport", "cpus"), [("pci", 2), ("mmio", 1)])
def test_it_answers_on_its_console_and_has_its_disk(
    tmp_path: Path, transport: str, cpus: int
) -> None:
    found = linux_guest.kernels()
    if "cloud" not in found:
        pytest.skip("PYKVM_KERNELS names no folder with Debian's cloud kernel (tests/rig sets it)")
    linux_guest.need_native_ring0()
    initrd, image = tmp_path / "initrd.gz", tmp_path / "root.img"
    initrd.write_bytes(linux_disk.initrd(found["cloud"]))
    linux_disk.root_image(image, 32 << 20, SCRIPT)
    snapshot = tmp_path / "debian.snapshot"
    with pykvm.Machine("192M", cpus=cpus, irqchip=True, pit=True) as m:
        m.disk(image, transport=transport)
        m.virtio(Rng(), transport=transport)
        m.boot(found["cloud"], initrd=initrd, cmdline="console=ttyS0 panic=-1 quiet")
        with m.start(timeout=BOOT_SECONDS) as running:
            m.console.expect(b"MARKER ready", BOOT_SECONDS)
            m.console.write(b"one\n")
            m.console.expect(b"answer <one> after <>", BOOT_SECONDS)
            m.console.expect(b"written", BOOT_SECONDS)
            assert running.stop().reason == reasons.STOPPED
        began = time.monotonic()
        s = m.snapshot()
        taken = time.monotonic()
        s.save(snapshot)
        copy = tmp_path / "copy.img"  # memory and disk of the same moment
        shutil.copy(image, copy)
        print(f"{s!r}: taken in {taken - began:.2f} s, saved in {time.monotonic() - taken:.2f} s")
        # In place: the same moment again and again.
        for turn in range(2):
            with m.start(timeout=BOOT_SECONDS) as running:
                m.console.write(b"again%d\n" % turn)
                m.console.expect(b"answer <again%d> after <one>" % turn, BOOT_SECONDS)
                running.stop()
            if turn == 0:
                s.restore()  # its disk is not part of it; what it has cached of it is
        s.close()
    done = subprocess.run(
        [sys.executable, "-c", GO_ON, str(snapshot), str(copy), transport],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    print(done.stdout[-3000:], done.stderr[-3000:])
    assert done.returncode == 0
    assert "answer <two> after <one>" in done.stdout
    assert "answer <end> after <two>" in done.stdout
    assert "\n16\n" in done.stdout  # of its random numbers
    assert f"RESULT {reasons.POWER_OFF}" in done.stdout
