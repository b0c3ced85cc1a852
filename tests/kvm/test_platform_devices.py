"""QEMU's test devices and what runs on them: a multiboot guest as KVM's tests are, tiny ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import pykvm
from pykvm import result as reasons
from pykvm.cli.main import cli
from pykvm.devices.debug_exit import qemu_status
from tests.support import multiboot_guest

GENEROUS = 60.0
"""Seconds; a run that needs them hangs."""

GREETING = "a.flat one two\r\nall processors are there\r\n"

kernel_and_split = pytest.mark.parametrize(
    "irqchip",
    [
        pytest.param("kernel", marks=pytest.mark.cap("KVM_CAP_IRQCHIP")),
        pytest.param("split", marks=pytest.mark.cap("KVM_CAP_SPLIT_IRQCHIP")),
    ],
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The multiboot guest, flat and as ELF32, both called a.flat."""
    made = {}
    for name, data in (("flat", multiboot_guest.image()), ("elf", multiboot_guest.elf32())):
        made[name] = tmp_path_factory.mktemp(name) / "a.flat"
        made[name].write_bytes(data)
    return made


# ---- a multiboot guest -------------------------------------------------------------------------


@kernel_and_split
@pytest.mark.parametrize(("kind", "cpus"), [("flat", 1), ("elf", 4)])
def test_a_multiboot_guest_finds_all_that_tests_of_kvm_start_with(
    images: dict[str, Path], irqchip: str, kind: str, cpus: int
) -> None:
    with pykvm.Machine("32M", cpus=cpus, irqchip=irqchip, pit=irqchip == "kernel") as m:
        plan = m.boot(images[kind], cmdline="one two")
        m.test_devices()
        result = m.run(timeout=GENEROUS)
        assert plan.protocol == "multiboot"
        assert m.console.transcript.decode() == GREETING, result
        assert (result.reason, result.code) == (reasons.DEBUG_EXIT, 0), result


def test_without_the_test_devices_it_waits_for_processors_that_there_are_not(
    images: dict[str, Path],
) -> None:
    """fw_cfg reads all ones then: so the test above can fail."""
    with pykvm.Machine("32M", irqchip="kernel", pit=True) as m:
        m.boot(images["flat"])
        assert m.run(timeout=0.5).reason == reasons.TIMEOUT
        assert m.console.transcript == b"a.flat console=ttyS0\r\n"


# ---- one device after the other ----------------------------------------------------------------


def test_the_flushed_page_is_faulted_in_again_with_what_was_there() -> None:
    faults = []
    for port in (0xE0, 0xE4):  # one that only keeps the value, then the flush
        with pykvm.Machine("2M") as m:
            m.test_devices()
            code = f"""
                mov     ecx, 20
            1:  mov     [0x100000], ecx
                mov     eax, 0x100000
                out     {port}, eax
                cmp     [0x100000], ecx
                jne     2f
                loop    1b
            2:  mov     al, cl
                out     0xf4, al
            """
            m.load(pykvm.asm(code, at=0x8000))
            # Ring 3: a KVM that emulates ring 0 needs no tables for that.
            m.cpu.enter("long64", entry=0x8000, ring=3, iopl=3)
            result = m.run(timeout=GENEROUS)
            assert (result.reason, result.code) == (reasons.DEBUG_EXIT, 0), result
            with m.cpu.vcpu.get_stats_fd() as stats:
                taken = stats.read()["pf_taken"]
            assert isinstance(taken, int)
            faults.append(taken)
    kept, flushed = faults
    assert kept < 20 <= flushed - kept


@pytest.mark.parametrize("gpa", [0xFF000000, 0x200000, 0xFFFFF000])
def test_a_flush_of_what_is_no_ram_does_nothing(gpa: int) -> None:
    with pykvm.Machine("2M") as m:
        m.test_devices()
        m.load(pykvm.asm(f"mov eax, {gpa}; out 0xe4, eax; mov al, 9; out 0xf4, al", at=0x8000))
        m.cpu.enter("long64", entry=0x8000)
        assert m.run(timeout=GENEROUS).code == 9


def test_without_an_irqchip_the_interrupt_lines_lead_nowhere() -> None:
    with pykvm.Machine("2M") as m:
        m.test_devices()
        m.load(pykvm.asm("mov dx, 0x2004; mov al, 1; out dx, al; out 0xf4, al", at=0x8000))
        m.cpu.enter("long64", entry=0x8000)
        assert m.run(timeout=GENEROUS).code == 1


# ---- the command line --------------------------------------------------------------------------


class Done(NamedTuple):
    """What came of a command."""

    returncode: int | str | None
    stdout: bytes
    stderr: bytes


Pykvm = Callable[..., Done]


@pytest.fixture
def pykvm_command(capfdbinary: pytest.CaptureFixture[bytes]) -> Pykvm:
    """The command line, in this process."""

    def run(*args: str | Path) -> Done:
        with pytest.raises(SystemExit) as end:
            cli.main([str(arg) for arg in args], prog_name="pykvm")
        return Done(end.value.code, *capfdbinary.readouterr())

    return run


@pytest.fixture
def flat(tmp_path: Path) -> Callable[..., Path]:
    """``flat(text, mode)``: the path of a flat binary."""

    def write(text: str, mode: str = "long64") -> Path:
        file = tmp_path / "guest.bin"
        at = 0x7C00 if mode == "real16" else 0x8000
        file.write_bytes(pykvm.asm(text, mode=mode, at=at))  # type: ignore[arg-type]
        return file

    return write


@kernel_and_split
def test_boot_ends_as_qemu_would(
    pykvm_command: Pykvm, images: dict[str, Path], irqchip: str
) -> None:
    done = pykvm_command(
        "boot", images["elf"], "--append", "one two", "--cpus", "2", "--memory", "32M",
        "--irqchip", irqchip, "--test-devices", "--timeout", str(GENEROUS),
    )  # fmt: skip
    assert done.stdout.decode() == GREETING, done
    assert done.returncode == 1
    assert b"pykvm: a.flat: debug-exit 0 after" in done.stderr


@pytest.mark.parametrize(("code", "status"), [(0, 1), (3, 7), (0x31, 0x63), (0x80, 1)])
def test_run_ends_as_qemu_would(
    pykvm_command: Pykvm, flat: Callable[..., Path], code: int, status: int
) -> None:
    guest = flat(f"mov al, '*'; out 0xe9, al; mov eax, {code}; out 0xf4, eax")
    done = pykvm_command("run", guest, "--test-devices")
    assert (done.returncode, done.stdout) == (status, b"*"), done
    assert status == qemu_status(code)


def test_run_has_the_number_of_processors_where_guests_of_qemu_look(
    pykvm_command: Pykvm, flat: Callable[..., Path]
) -> None:
    guest = flat(
        """
            cmp     edi, 0
            jne     1f
            mov     dx, 0x510
            mov     ax, 5
            out     dx, ax
            inc     dx
            in      al, dx
            out     0xf4, al
        1:  hlt
        """
    )
    done = pykvm_command("run", guest, "--test-devices", "--cpus", "3")
    assert done.returncode == 2 * 3 + 1, done


PIT_AT_VECTOR_8 = """
        mov     word ptr [0x20], offset handler
        mov     word ptr [0x22], 0
        mov     al, 0x34
        out     0x43, al
        mov     al, 0xff
        out     0x40, al
        out     0x40, al
    1:  sti
        hlt
        jmp     1b
    handler:
        mov     al, 8
        out     0xf4, al
"""


@pytest.mark.cap("KVM_CAP_IRQCHIP")
@pytest.mark.cap("KVM_CAP_PIT2")
def test_run_gives_a_guest_for_bios_machines_its_timer(
    pykvm_command: Pykvm, flat: Callable[..., Path]
) -> None:
    guest = flat(PIT_AT_VECTOR_8, "real16")
    done = pykvm_command("run", guest, "--mode", "real16", "--pit", "--pic", "bios")
    assert done.returncode == 208, done


@pytest.mark.parametrize(
    "options", [("--irqchip", "split", "--pit"), ("--irqchip", "none", "--pic", "bios")]
)
def test_what_does_not_go_together_is_wrong_usage(
    pykvm_command: Pykvm, flat: Callable[..., Path], options: tuple[str, ...]
) -> None:
    done = pykvm_command("run", flat("hlt"), *options)
    assert done.returncode == 2
    assert b'needs irqchip="kernel"' in done.stderr
