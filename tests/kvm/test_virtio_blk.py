"""Block devices on a real KVM: driven by hand, and by Debian's kernel with its root on one."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from struct import pack

import pytest

import pykvm
from pykvm import result as reasons
from pykvm.errors import DiskError
from pykvm.virtio import Blk, DiskSpec, Rng
from tests.kvm.test_virtio import GENEROUS, PROBE, SERVED
from tests.support import linux_disk, linux_guest
from tests.support.vring_driver import WRITE, Driver

BOOT_SECONDS = 300.0
CONTENT = bytes(n // 512 & 0xFF for n in range(64 * 1024))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


def serve(m: pykvm.Machine, driver: Driver, type: int, sector: int, data: int, length: int) -> int:
    """One request of a guest in long mode: its status."""
    direction = WRITE if type == 0 else 0
    m.mem.write(0x30000, pack("<IIQ", type, 0, sector))
    m.mem.u8[0x30010] = 0xEE
    driver.send((0x30000, 16, 0), (data, length, direction), (0x30010, 1, WRITE))
    m.cpu.enter("long64", entry=0x8000)
    result = m.run(timeout=GENEROUS).check()
    assert result.reason == reasons.HALTED
    return m.mem.u8[0x30010]


@pytest.mark.parametrize("io", ["sync", "thread"])
def test_a_guest_in_long_mode_reads_and_writes(image: Path, io: str) -> None:
    code = pykvm.asm((PROBE + SERVED).replace("QUEUE", "0"), mode="long64")
    with pykvm.Machine("2M") as m:
        device = m.disk(image, serial="A1", io=io)
        m.load(code, at=0x8000)
        driver = Driver(m.memory, 8, desc=0x20000, driver=0x21000, device=0x22000)
        assert serve(m, driver, 0, 3, 0x40000, 1024) == 0
        assert m.mem.read(0x40000, 1024) == CONTENT[1536:2560]
        assert m.devices == {"blk": device}
    again = driver
    with pykvm.Machine("2M") as m:
        m.disk(image, io=io)
        m.load(code, at=0x8000)
        again = Driver(m.memory, 8, desc=0x20000, driver=0x21000, device=0x22000)
        m.mem.write(0x40000, b"w" * 512)
        assert serve(m, again, 1, 5, 0x40000, 512) == 0
    assert image.read_bytes()[2560:3072] == b"w" * 512


def test_a_disk_that_cannot_be_opened_leaves_the_machine_usable(image: Path) -> None:
    other = image.with_name("other.img")
    other.write_bytes(CONTENT)
    with pykvm.Machine("2M") as m:
        m.disk(image)
        with pytest.raises(DiskError, match="this process"):
            m.disk(image)
        with pytest.raises(FileNotFoundError):
            m.disk(image.with_name("none"))
        with pytest.raises(ValueError, match="1 to 64 queues"):
            m.disk(other, queues=0)
        m.disk(other).close()
        assert list(m.devices) == ["blk", "blk1"]


def command(*args: str | Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "pykvm", "run", *map(str, args)]
    return subprocess.run(words, capture_output=True, text=True, timeout=100)


def test_the_command_line_has_disks(image: Path, tmp_path: Path) -> None:
    guest = tmp_path / "guest.S"
    # The third register of the window is the device's type: 2, a block device.
    guest.write_text("mov edi, 0xd0000000; mov eax, [rdi + 8]; add al, '0'; out 0xe9, al; hlt")
    done = command(guest, "--disk", f"{image},overlay", "--json")
    data = json.loads(done.stdout)
    assert data["console"] == "2" and data["devices"]["blk"]["requests"] == 0
    with pykvm.Machine("2M") as m:
        m.disk(image)
        done = command(guest, "--disk", image)
    assert done.returncode == 1
    assert re.search(rf"pykvm: {image}: process {os.getpid()} \(.*has it open", done.stderr)


# ---- Linux -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def kernel() -> Path:
    found = linux_guest.kernels()
    if "cloud" not in found:
        pytest.skip("PYKVM_KERNELS names no folder with Debian's cloud kernel (tests/rig sets it)")
    linux_guest.need_native_ring0()
    return found["cloud"]


@pytest.fixture(scope="session")
def initrd(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "initrd.gz"
    path.write_bytes(linux_disk.initrd(kernel))
    return path


Boot = Callable[..., tuple[pykvm.Machine, str]]


@pytest.fixture
def boot(kernel: Path, initrd: Path) -> Iterator[Boot]:
    machines: list[pykvm.Machine] = []

    def run(
        *disks: Path | DiskSpec,
        cpus: int = 1,
        memory: str = "192M",
        queues: Iterable[int] = (),
        transport: str | None = None,
        irqchip: str = "kernel",
        meanwhile: Callable[[pykvm.Machine], None] = lambda m: None,
    ) -> tuple[pykvm.Machine, str]:
        m = pykvm.Machine(memory, cpus=cpus, irqchip=irqchip, pit=irqchip == "kernel")
        machines.append(m)
        for disk, count in zip(disks, itertools.chain(queues, itertools.repeat(1)), strict=False):
            m.disk(disk, queues=count, transport=transport)
        m.virtio(Rng(), transport=transport)
        m.boot(kernel, initrd=initrd, cmdline="console=ttyS0 panic=-1 quiet")
        helper = threading.Thread(target=meanwhile, args=(m,))
        helper.start()
        result = m.run(timeout=BOOT_SECONDS)
        helper.join(60)
        text = m.console.transcript.decode(errors="replace")
        assert result.reason == reasons.POWER_OFF, f"{result}\n{text[-3000:]}"
        assert "MARKER end" in text, text[-3000:]
        return m, text

    yield run
    for m in machines:
        m.close()


FILES = r"""
busybox grep virtio /proc/interrupts
busybox dd if=/dev/hwrng of=/out/hwrng bs=64 count=1 2>/dev/null && echo "MARKER hwrng"
busybox cat /sys/block/vda/queue/write_cache /sys/block/vda/queue/discard_granularity
busybox dd if=/dev/urandom of=/out/random bs=64k count=40 2>/dev/null
busybox sha256sum /out/random
i=0; while [ $i -lt 50 ]; do echo "file $i" >/out/small-$i; i=$((i+1)); done
busybox dd if=/dev/urandom of=/out/large bs=64k count=160 conv=fsync 2>/dev/null
echo "MARKER before"; busybox sync
busybox rm /out/large; busybox sync; busybox fstrim /
echo "MARKER size $(busybox blockdev --getsize64 /dev/vdb)"; read -r line
echo "MARKER size $(busybox blockdev --getsize64 /dev/vdb)"
"""


def grow(m: pykvm.Machine) -> None:
    """Make the second disk larger when the guest has seen it."""
    m.console.expect(b"MARKER size 65536", timeout=BOOT_SECONDS)
    device = m.devices["blk1"]
    assert isinstance(device, Blk)
    os.truncate(device.disk.path, 1 << 20)
    assert device.refresh()
    m.console.write(b"\n")


VECTORS = {"mmio": r"IO-APIC +\d+-edge +virtio", "pci": r"PCI-MSI +\d+-edge +virtio0-req\.0"}


@pytest.mark.watchdog(600)
@pytest.mark.parametrize(("transport", "irqchip"), [("pci", "split"), ("mmio", "kernel")])
def test_linux_has_its_root_on_a_disk(
    boot: Boot, image: Path, tmp_path: Path, transport: str, irqchip: str
) -> None:
    second, image = image, tmp_path / "root.img"
    linux_disk.root_image(image, 48 << 20, FILES)
    before = image.stat().st_blocks * 512
    m, text = boot(image, second, meanwhile=grow, transport=transport, irqchip=irqchip)
    assert "MARKER size 1048576" in text
    assert re.search(VECTORS[transport], text) and "MARKER hwrng" in text, text[-3000:]
    assert linux_disk.read_file(image, "/out/hwrng").strip(b"\0")
    assert "MARKER root /dev/vda / ext4 rw" in text and "write back" in text
    device = m.devices["blk"]
    assert isinstance(device, Blk)
    counters = device.counters
    assert counters.requests > 50 and counters.errors == 0 and counters.latency.count > 50
    m.close()
    linux_disk.check(image)
    said = re.search(r"([0-9a-f]{64})  /out/random", text)
    assert said is not None, text[-2000:]
    assert hashlib.sha256(linux_disk.read_file(image, "/out/random")).hexdigest() == said[1]
    for number in (0, 25, 49):
        assert linux_disk.read_file(image, f"/out/small-{number}") == f"file {number}\n".encode()
    # 10 MiB were written and given back again.
    assert image.stat().st_size == 48 << 20
    if device.disk.can_discard:
        assert image.stat().st_blocks * 512 < before + (6 << 20)


FIO = r"""
busybox mount -t tmpfs tmp /out
echo "MARKER $(busybox nproc) cpus, $(busybox ls /sys/block/vdb/mq | busybox wc -l) queues"
fio --output=/out/log --minimal /fio.ini; echo "MARKER fio $?"
busybox cut -c 1-200 /out/log
"""

JOBS = """
[global]
direct=1
size=256k
verify=crc32c
verify_fatal=1
ioengine=libaio
iodepth=4
thread=1
[sequential]
filename=/dev/vdb
rw=write
bs=64k
[random]
filename=/dev/vdb
rw=randwrite
bs=4k
offset=2M
[mixed]
filename=/dev/vdb
rw=randrw
bsrange=512-16k
verify_interval=512
offset=4M
[flushed]
filename=/dev/vdb
rw=randwrite
bs=4k
fsync=8
size=128k
offset=6M
ioengine=psync
iodepth=1
[files]
filename=/data
direct=0
fsync=16
rw=randwrite
bs=8k
ioengine=psync
iodepth=1
"""


@pytest.fixture(scope="session")
def fio_root(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with fio, made once: each boot has an overlay over it."""
    linux_disk.tool("fio")
    path = tmp_path_factory.mktemp("fio") / "root.img"
    linux_disk.root_image(path, 160 << 20, FIO, ["fio"], {"fio.ini": JOBS})
    return path


@pytest.mark.watchdog(900)
@pytest.mark.parametrize("cpus", [1, 2])
def test_fio_finds_what_it_has_written(
    boot: Boot, fio_root: Path, tmp_path: Path, cpus: int
) -> None:
    """Several jobs at once, on a disk with a queue for each processor."""
    data = tmp_path / "data.img"
    with data.open("xb") as file:
        file.truncate(8 << 20)
    before = zlib.crc32(fio_root.read_bytes())
    m, text = boot(DiskSpec(fio_root, overlay=True), data, cpus=cpus, queues=(1, cpus))
    assert f"MARKER {cpus} cpus, {cpus} queues" in text, text[-4000:]
    assert "MARKER fio 0" in text, text[-4000:]
    counters = m.devices["blk1"].counters
    assert counters.errors == 0
    # Everything was written (of the mixed job a half), and read again.
    assert counters.bytes_out > 640 << 10 and counters.bytes_in > 640 << 10
    m.close()
    assert data.read_bytes().strip(b"\0")
    assert zlib.crc32(fio_root.read_bytes()) == before
