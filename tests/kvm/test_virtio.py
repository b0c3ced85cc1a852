"""Virtio devices on a real KVM, driven by hand from long mode."""

from __future__ import annotations

import os
import re
import threading
import time
from typing import Any

import pytest

import pykvm
from pykvm import kvm
from pykvm import result as reasons
from pykvm.virtio import Console, Rng, VirtioDevice
from tests.support.vring_driver import WRITE, Driver

GENEROUS = 60.0
"""Seconds; a run that needs them hangs."""

PROBE = """
        mov edi, 0xd0000000
        mov dword ptr [rdi + 0x70], 1       # ACKNOWLEDGE, DRIVER
        mov dword ptr [rdi + 0x70], 3
        mov dword ptr [rdi + 0x24], 1       # VERSION_1
        mov dword ptr [rdi + 0x20], 1
        mov dword ptr [rdi + 0x70], 11      # FEATURES_OK
        mov dword ptr [rdi + 0x30], QUEUE
        mov dword ptr [rdi + 0x38], 8
        mov dword ptr [rdi + 0x80], 0x20000
        mov dword ptr [rdi + 0x90], 0x21000
        mov dword ptr [rdi + 0xa0], 0x22000
        mov dword ptr [rdi + 0x44], 1
        mov dword ptr [rdi + 0x70], 15      # DRIVER_OK
"""

SERVED = """
        mov dword ptr [rdi + 0x50], QUEUE
    wait:
        mov eax, [rdi + 0x60]               # interrupt status: the used ring is first
        test eax, eax
        jz wait
        mov [0x1f000], eax
        mov [rdi + 0x64], eax
        mov eax, [rdi + 0x60]
        mov [0x1f004], eax
        mov eax, [rdi + 0x70]
        mov [0x1f008], eax
        hlt
"""


def machine(
    device: VirtioDevice,
    io: str,
    *,
    code: str = PROBE + SERVED,
    queue: int = 0,
    gsi: int | None = None,
    irqchip: bool = False,
) -> tuple[pykvm.Machine, Driver]:
    m = pykvm.Machine("2M", irqchip=irqchip)
    m.virtio(device, io=io, gsi=gsi)
    m.load(pykvm.asm(code.replace("QUEUE", str(queue)), mode="long64"), at=0x8000)
    m.cpu.enter("long64", entry=0x8000)
    return m, Driver(m.memory, 8, desc=0x20000, driver=0x21000, device=0x22000)


@pytest.mark.parametrize("io", ["sync", "thread"])
def test_a_guest_reads_random_bytes(io: str) -> None:
    m, driver = machine(Rng(source=lambda count: b"random" * count), io)
    with m:
        driver.send((0x30000, 16, WRITE))
        result = m.run(timeout=GENEROUS).check()
        assert m.mem.read(0x30000, 17) == b"randomrandomrand\0"
        assert driver.used() == [(0, 16)]
        assert [m.mem.u32[0x1F000 + at] for at in (0, 4, 8)] == [1, 0, 15]
    assert result.reason == reasons.HALTED
    assert result.devices["rng"]["requests"] == 1
    assert result.devices["rng"]["bytes_in"] == 16


@pytest.mark.parametrize("io", ["sync", "thread"])
def test_a_guest_writes_a_line(io: str) -> None:
    seen: list[bytes] = []
    console = Console(output=seen.append)
    m, driver = machine(console, io, queue=1)
    with m:
        m.mem[0x30000:0x30006] = b"Hello\n"
        driver.send((0x30000, 6, 0))
        m.run(timeout=GENEROUS).check()
        assert console.expect(b"lo\n", timeout=0) == b"Hello\n"
        assert console.read() == b"Hello\n" and seen == [b"Hello\n"]


@pytest.mark.parametrize("io", ["sync", "thread"])
def test_what_was_typed_early_is_received(io: str) -> None:
    console = Console()
    m, driver = machine(console, io)
    with m:
        console.write(b"ls\n")
        driver.send((0x30000, 64, WRITE))
        m.run(timeout=GENEROUS).check()
        assert m.mem.read(0x30000, 4) == b"ls\n\0" and driver.used() == [(0, 3)]
        assert console.pending == 0


def test_a_breach_sets_needs_reset_and_the_run_goes_on() -> None:
    rng = Rng()
    code = PROBE + "mov dword ptr [rdi + 0x50], 0; mov eax, [rdi + 0x70]; out 0xf4, al; hlt"
    m, driver = machine(rng, "sync", code=code)
    with m:
        m.debug_exit()
        driver.offer(77)
        result = m.run(timeout=GENEROUS)
        assert (result.reason, result.code) == (reasons.DEBUG_EXIT, 15 | 64)
        assert "outside the descriptor table" in rng.broken
        assert result.devices["rng"]["errors"] == 1


def test_what_a_device_raises_in_its_thread_ends_the_run() -> None:
    def source(count: int) -> bytes:
        raise OSError("no randomness today")

    m, driver = machine(Rng(source=source), "thread")
    with m:
        driver.send((0x30000, 16, WRITE))
        with pytest.raises(OSError, match="today"):
            m.run(timeout=GENEROUS)


def test_interrupts_arrive_as_edges_on_their_line() -> None:
    """The PIC remembers an edge, also while it is masked."""
    code = PROBE + "mov dword ptr [rdi + 0x50], 0; wait: jmp wait"
    m, driver = machine(Rng(), "thread", code=code, gsi=5, irqchip=True)
    with m:
        driver.send((0x30000, 16, WRITE))

        def requested() -> int:
            pic = m.vm.get_irqchip(kvm.KVM_IRQCHIP_PIC_MASTER).chip.pic
            return int(pic.irr) >> 5 & 1

        assert not requested()
        done = threading.Event()

        def stop_when_served() -> None:
            while not driver.used() and not done.wait(0.001):
                pass
            m.stop()

        thread = threading.Thread(target=stop_when_served)
        thread.start()
        result = m.run(timeout=GENEROUS)
        done.set()
        thread.join(60)
        assert result.reason == reasons.STOPPED
        patience = time.monotonic() + GENEROUS
        while not requested():  # KVM hands it to a worker of its own
            assert time.monotonic() < patience


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"io": "carrier pigeon"}, "thread"),
        ({"base": 0xD000_0800}, "page boundary"),
        ({"base": 0x100000}, "RAM"),
    ],
)
def test_a_wrong_attachment_is_refused(arguments: dict[str, Any], why: str) -> None:
    with pykvm.Machine("2M") as m:
        with pytest.raises(ValueError, match=why):
            m.virtio(Rng(), **arguments)
        assert not m.devices


def test_devices_have_names_windows_and_a_command_line() -> None:
    with pykvm.Machine("2M", irqchip=True) as m:
        first, second = m.virtio(Rng(), transport="mmio"), m.virtio(Rng(), gsi=5)
        assert m.devices == {"rng": first, "rng1": second}
        assert m.virtio_windows == [(0xD000_0000, 0x1000, 16), (0xD000_1000, 0x1000, 5)]
        assert m.virtio_cmdline == (
            "virtio_mmio.device=4K@0xd0000000:16 virtio_mmio.device=4K@0xd0001000:5"
        )
        with pytest.raises(pykvm.BusOverlapError):
            m.virtio(Rng(), base=0xD000_0000)


def test_expect_ends_with_the_run() -> None:
    console = Console()
    m, _ = machine(console, "thread", code="hlt")
    with m:
        m.run(timeout=GENEROUS).check()
        with pytest.raises(Exception, match="the run ended"):
            console.expect(re.compile(b"never"))


def test_a_console_can_be_waited_on_as_soon_as_a_run_has_started() -> None:
    console = Console()
    code = "mov edi, 0xd0000108; mov byte ptr [rdi], '#'; hlt"
    m, _ = machine(console, "thread", code=code)
    with m:
        for _ in range(3):
            m.cpu.enter("long64", entry=0x8000)
            running = m.start(timeout=GENEROUS)
            assert console.expect(b"#", timeout=GENEROUS) == b"#"
            assert running.wait().reason == reasons.HALTED


def test_nothing_is_left_behind() -> None:
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        m, driver = machine(Rng(), "thread")
        with m:
            driver.send((0x30000, 16, WRITE))
            m.run(timeout=GENEROUS).check()
    assert set(os.listdir("/proc/self/fd")) == before
    assert not any(thread.name == "pykvm-io" for thread in threading.enumerate())
