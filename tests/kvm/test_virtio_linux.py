"""Debian's kernel meets the entropy device and the console."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import pykvm
from pykvm import result as reasons
from pykvm.virtio import Console, Rng
from tests.support import linux_guest, linux_virtio

BOOT_SECONDS = 300.0
LINES = 200

SCRIPT = r"""
echo "MARKER rng $($b cat /sys/class/misc/hw_random/rng_current)"
$b dd if=/dev/hwrng of=/random bs=512 count=8 iflag=fullblock 2>/dev/null
n=$($b od -An -v -tx8 -w8 /random | $b sort -u | $b wc -l)
echo "MARKER bytes $($b stat -c %s /random) distinct $n"
exec </dev/hvc0 >/dev/hvc0 2>&1
i=0; while [ $i -lt 200 ]; do echo "line $i of what is said through a queue"; i=$((i+1)); done
echo "MARKER ready"
while read -r line; do
    [ "$line" = end ] && break
    [ "$line" = size ] && line="size $($b stty size)"
    echo "heard: <$line>"
done
exec >/dev/console
"""


@pytest.fixture(scope="module")
def kernel() -> Path:
    found = linux_guest.kernels()
    if "generic" not in found:
        pytest.skip("PYKVM_KERNELS names no folder with Debian's kernel (tests/rig sets it)")
    linux_guest.need_native_ring0()
    return found["cloud"] if "cloud" in found else found["generic"]


@pytest.mark.watchdog(600)
def test_linux_gets_randomness_and_talks_through_a_console(kernel: Path) -> None:
    modules = ("virtio_mmio", "virtio_pci", "virtio_rng", "virtio_console")
    initrd = linux_virtio.initrd(kernel, modules, SCRIPT)
    heard: list[bytes] = []
    with pykvm.Machine("192M", irqchip=True, pit=True) as m:
        rng = m.virtio(Rng(), transport="mmio")
        console = m.virtio(Console(), transport="pci")
        m.boot(kernel, initrd=initrd, cmdline="console=ttyS0 panic=-1 quiet")

        def talk() -> None:
            try:
                heard.append(console.expect(b"MARKER ready", timeout=BOOT_SECONDS))
                for word in (b"one", b"two", b"a longer line" * 10):
                    console.write(word + b"\n")
                    heard.append(console.expect(b"heard: <" + word + b">", timeout=60))
                console.resize(100, 37)  # Linux asks for the size when it is told of a change
                console.write(b"size\n")
                heard.append(console.expect(b"heard: <size 37 100>", timeout=60))
                console.write(b"end\n")
            except Exception as error:
                heard.append(repr(error).encode())
                m.stop()

        thread = threading.Thread(target=talk)
        thread.start()
        result = m.run(timeout=BOOT_SECONDS)
        thread.join(60)
        text = m.console.transcript.decode(errors="replace")
    assert result.reason == reasons.POWER_OFF, f"{result}\n{heard}\n{text[-3000:]}"
    assert "MARKER rng virtio_rng.0" in text
    assert "MARKER bytes 4096 distinct 512" in text
    assert "MARKER end" in text
    assert len(heard) == 5, heard
    said = heard[0].decode().splitlines()
    lines = [f"line {n} of what is said through a queue" for n in range(LINES)]
    assert [line for line in said if line.startswith("line ")] == lines
    assert rng.counters.bytes_in >= 4096 and rng.counters.errors == 0
    assert not rng.broken and not console.broken
    assert result.devices["console"]["interrupts"] > 3
