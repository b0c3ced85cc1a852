"""Debian's kernels, unmodified, to user space and to each of their ends."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pykvm
from pykvm import result as reasons
from pykvm.console import ExpectError
from pykvm.devices import ioapic
from pykvm.irqchip import SplitIrqchip
from tests.support import linux_guest

BOOT_SECONDS = 240.0
"""Generous: KVM itself may be emulated here."""

pytestmark = pytest.mark.watchdog(600)


@pytest.fixture(scope="session")
def images() -> dict[str, Path]:
    found = linux_guest.kernels()
    if not found:
        pytest.skip("PYKVM_KERNELS names no folder with Debian kernels (tests/rig sets it)")
    linux_guest.need_native_ring0()
    return found


@pytest.fixture(scope="session")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("boot") / "initrd.gz"
    path.write_bytes(linux_guest.initrd())
    return path


Start = Callable[..., pykvm.Machine]


@pytest.fixture
def start(images: dict[str, Path], initrd: Path) -> Iterator[Start]:
    machines: list[pykvm.Machine] = []

    def make(
        do: str,
        *,
        flavour: str = "cloud",
        cpus: int = 1,
        memory: str = "256M",
        irqchip: str = "kernel",
        more: str = "",
        **options: object,
    ) -> pykvm.Machine:
        if flavour not in images:
            pytest.skip(f"PYKVM_KERNELS has no {flavour} kernel")
        m = pykvm.Machine(memory, cpus=cpus, irqchip=irqchip, pit=irqchip == "kernel")
        machines.append(m)
        cmdline = f"console=ttyS0 panic=-1 quiet do={do} {more}"
        m.boot(images[flavour], initrd=initrd, cmdline=cmdline, **options)  # type: ignore[arg-type]
        return m

    yield make
    for m in machines:
        m.close()


@pytest.mark.parametrize("flavour", ["cloud", "generic"])
@pytest.mark.parametrize("cpus", [1, 2])
def test_it_boots_to_user_space_and_powers_off(start: Start, flavour: str, cpus: int) -> None:
    m = start("poweroff", flavour=flavour, cpus=cpus)
    result = m.run(timeout=BOOT_SECONDS)
    text = m.console.transcript.decode()
    assert result.reason == reasons.POWER_OFF, f"{result}\n{text[-2000:]}"
    assert "MARKER up 6." in text
    assert text.count("processor\t") == cpus
    for phase in ("first_instruction", "first_byte"):
        assert result.timings[phase] > 0


@pytest.mark.parametrize("protocol", ["bzimage", "vmlinux", "pvh"])
def test_every_protocol_gets_there(start: Start, protocol: str) -> None:
    m = start("poweroff", protocol=protocol)
    assert m.pc is not None and m.pc.plan is not None and m.pc.plan.protocol == protocol
    result = m.run(timeout=BOOT_SECONDS)
    assert result.reason == reasons.POWER_OFF, m.console.lines(30)
    assert b"MARKER up" in m.console.transcript


@pytest.mark.parametrize(("do", "reason"), [("reboot", reasons.REBOOT), ("panic", reasons.PANIC)])
def test_ends_are_told_apart(start: Start, do: str, reason: str) -> None:
    m = start(do)
    result = m.run(timeout=BOOT_SECONDS)
    assert result.reason == reason, m.console.lines(30)
    assert not result.ok
    with pytest.raises(pykvm.RunError):
        result.check()


def test_without_acpi_the_mp_table_tells_of_processors_and_interrupts(start: Start) -> None:
    m = start("reboot", flavour="generic", cpus=2, more="acpi=off")
    result = m.run(timeout=BOOT_SECONDS)
    text = m.console.transcript.decode()
    assert result.reason == reasons.REBOOT, f"{result}\n{text[-2000:]}"
    assert text.count("processor\t") == 2


def test_what_is_typed_comes_back(start: Start) -> None:
    m = start("echo")
    with m.start(timeout=BOOT_SECONDS) as running:
        m.console.expect(b"type something", BOOT_SECONDS)
        m.console.write(b"hello from outside\n")
        m.console.expect(b"typed: <hello from outside>", BOOT_SECONDS)
        with pytest.raises(ExpectError, match="never printed"):
            m.console.expect(b"never printed", BOOT_SECONDS)
        assert running.wait(BOOT_SECONDS).reason == reasons.POWER_OFF


def test_it_boots_on_the_split_irqchip_and_takes_input_through_it(start: Start) -> None:
    m = start("echo", irqchip="split", cpus=2)
    chip = m.irqchip
    assert isinstance(chip, SplitIrqchip)
    with m.start(timeout=BOOT_SECONDS) as running:
        m.console.expect(b"type something", BOOT_SECONDS)
        entries = chip.ioapic.state()["entries"]
        m.console.write(b"hello from outside\n")
        result = running.wait()
    text = m.console.transcript.decode()
    assert result.reason == reasons.POWER_OFF, f"{result}\n{text[-2000:]}"
    assert text.count("processor\t") == 2
    assert "typed: <hello from outside>" in text
    com1, sci = entries[4], entries[9]
    assert not (com1 | sci) & ioapic.MASKED  # the interrupts of both do come this way
    assert (com1 & ioapic.LEVEL, sci & ioapic.LEVEL) == (0, ioapic.LEVEL)


@pytest.mark.parametrize("cpus", [2, 16])
def test_stop_ends_a_busy_linux_at_once_and_a_hang_is_told_with_the_place(
    start: Start, cpus: int
) -> None:
    m = start("hang", cpus=cpus)
    began = time.monotonic()
    with m.start(timeout=BOOT_SECONDS) as running:
        m.console.expect(b"MARKER", BOOT_SECONDS)
        print(f"{cpus} vCPUs: up after {time.monotonic() - began:.1f} s")
        began = time.monotonic()
        assert running.stop().reason == reasons.STOPPED
        print(f"{cpus} vCPUs: stopped after {(time.monotonic() - began) * 1000:.0f} ms")
    result = m.run(timeout=1)
    assert result.reason == reasons.TIMEOUT
    assert len(result.cpus) == cpus


@pytest.mark.parametrize(("do", "code"), [("poweroff", 0), ("reboot", 9), ("panic", 10)])
def test_the_command_says_it_by_its_exit_code(
    images: dict[str, Path], initrd: Path, do: str, code: int
) -> None:
    command = [
        sys.executable, "-m", "pykvm", "boot", str(images["cloud"]), "--initrd", str(initrd),
        "--append", f"console=ttyS0 panic=-1 quiet do={do}", "--memory", "256M",
        "--timeout", str(BOOT_SECONDS), "--json",
    ]  # fmt: skip
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=BOOT_SECONDS * 2
    )
    assert done.returncode == code, done.stderr.decode()
    told = json.loads(done.stdout)
    assert told["exit_code"] == code
    assert "MARKER up" in told["console"]
