"""Every shipped guest does on this KVM what it promises: output, reason, exit code."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import pykvm
from pykvm import guestlib
from pykvm import result as reasons
from pykvm.devices.access import MmioAccess, PioAccess
from pykvm.guest_devices import ExitCounter
from pykvm.guestlib import run_guest

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


def syscall_raises_privilege() -> bool:
    """Probe: does SYSCALL in ring 3 arrive in ring 0, where HLT is allowed?

    Some back ends that emulate ring 0 leave the privilege at 3 (docs/backends.md).
    """
    with pykvm.Machine("64K") as m:
        code = pykvm.asm("syscall; entry: hlt", at=0x8000)
        m.load(code)
        entered = m.cpu.enter("long64", 0x8000, ring=3)
        m.cpu.efer |= 1
        m.cpu.msr["STAR"] = entered.star
        m.cpu.msr["LSTAR"] = code.symbols["entry"]
        result = m.run(timeout=2)
    assert result.reason in (reasons.HALTED, reasons.SHUTDOWN), result
    return result.reason == reasons.HALTED


@pytest.mark.parametrize("name", guestlib.names())
def test_a_guest_prints_and_ends_as_it_promises(name: str) -> None:
    guest = guestlib.find(name)
    output, result = run_guest(guest)
    expected = guest.expected_output
    if name == "ring3" and not syscall_raises_privilege():
        assert expected is not None
        expected = expected.replace(
            "SYSCALL came with CPL 0", "SYSCALL came with CPL 3 still, an exception did the rest"
        )
    assert output == expected, result
    assert (result.reason, result.code) == (guest.expected_reason, guest.expected_code)


@pytest.mark.parametrize("name", ["hello", "long-mode"])
def test_a_guest_runs_again_and_again_alike(name: str) -> None:
    runs = {run_guest(guestlib.find(name))[0] for _ in range(5)}
    assert len(runs) == 1


def test_hello_makes_one_exit_a_character_and_one_to_halt() -> None:
    guest = guestlib.find("hello")
    _, result = run_guest(guest)
    assert guest.expected_output is not None
    assert result.exits == len(guest.expected_output) + 1


def test_a_live_console_sees_each_character_in_order() -> None:
    seen: list[str] = []
    output, result = run_guest(guestlib.find("hello"), console=seen.append)
    assert seen == list("Hello, KVM!\n") and output == "Hello, KVM!\n"
    assert result.reason == reasons.HALTED


def test_limits_of_the_caller_hold() -> None:
    output, result = run_guest(guestlib.find("hello"), max_exits=3)
    assert result.reason == reasons.LIMIT and output == "Hel"
    _, result = run_guest(guestlib.find("c-guest"), timeout=0)
    assert result.reason == reasons.TIMEOUT


def test_smp_counts_right_with_any_number_of_processors() -> None:
    guest = guestlib.find("smp")
    for cpus in (1, 2, 5):
        guest.cpus = cpus
        output, result = run_guest(guest)
        lines = [f"here is processor {n}" for n in range(cpus)]
        lines += ["every addition counts: 1000 from each of them"]
        assert output.splitlines() == lines, result


def test_exits_are_counted_by_the_host_as_the_guest_reports() -> None:
    guest = guestlib.find("exits")
    with pykvm.Machine(guest.memory) as m:
        m.pio.ignore(0xE9)
        m.debug_exit()
        guest.counter = False
        guest.prepare(m)
        counter = ExitCounter(m)
        assert m.run(timeout=10).code == 0
    assert (counter.pio, counter.mmio, counter.hlt) == (5, 4, 3)


def test_labels_of_a_guest_are_addresses_for_hooks() -> None:
    """`Code.symbols` and the machine agree: RIP at HLT is the label behind it."""
    code = pykvm.asm("nop; stop: hlt; after: nop", at=0x8000)
    with pykvm.Machine("64K") as m:
        m.load(code)
        m.cpu.enter("long64", code.at)
        assert m.run(timeout=2).reason == reasons.HALTED
        assert m.cpu.rip == code.symbols["after"]


# -- guests from files ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["real16", "prot32", "long64"])
def test_a_source_file_runs_in_every_mode(tmp_path: Path, mode: str) -> None:
    file = tmp_path / "guest.S"
    file.write_text("mov al, '!'\nout 0xe9, al\nmov al, 9\nout 0xf4, al\n")
    output, result = run_guest(guestlib.resolve(str(file), mode=mode))
    assert (output, result.reason, result.code) == ("!", reasons.DEBUG_EXIT, 9)


def test_a_flat_file_runs_at_the_address_given(tmp_path: Path) -> None:
    code = pykvm.asm("start: mov eax, offset start; shr eax, 12; out 0xf4, al", at=0x12000)
    file = tmp_path / "guest.bin"
    file.write_bytes(code)
    _, result = run_guest(guestlib.resolve(str(file), at=0x12000))
    assert result.code == 0x12


@needs_gcc
def test_a_32_bit_elf_runs_in_protected_mode(tmp_path: Path) -> None:
    source, built = tmp_path / "a.S", tmp_path / "a.elf"
    source.write_text(
        ".globl _start\n_start: movb value, %al\n addb bss, %al\n outb %al, $0xf4\n"
        ".data\nvalue: .byte 32\n.bss\nbss: .skip 1\n"
    )
    command = ["gcc", "-m32", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none"]
    command += ["-Wl,-Ttext=0x10000", "-Wl,-Tdata=0x20000", str(source), "-o", str(built)]
    subprocess.run(command, check=True, timeout=100)
    guest = guestlib.resolve(str(built))
    _, result = run_guest(guest)
    assert (result.reason, result.code) == (reasons.DEBUG_EXIT, 32)


def test_an_elf_outside_ram_is_refused(tmp_path: Path) -> None:
    guest = guestlib.find("c-guest")
    guest.memory = "1M"
    with pytest.raises(pykvm.BootError, match="expected RAM at 0x100000"):
        run_guest(guest)


# -- guests in C ---------------------------------------------------------------------------------

LIBRARY = r"""
#include "pykvm_guest.h"

static char a[300], b[300];
static uint64_t zeroed[64];
static uint32_t data = 0x12345678;

int main(void)
{
	for (int i = 0; i < 64; i++)
		guest_assert(zeroed[i] == 0);
	guest_assert(data == 0x12345678);
	memset(a, 'x', sizeof a);
	memcpy(b, a, sizeof b);
	guest_assert(memcmp(a, b, sizeof a) == 0);
	for (int i = 0; i < 300; i++)
		a[i] = (char)i;
	memmove(a + 1, a, 299);
	guest_assert(a[1] == 0 && a[299] == (char)298);
	memmove(a, a + 1, 299);
	guest_assert(a[0] == 0 && a[298] == (char)298);
	b[7] = 'w';
	guest_assert(memcmp(b, "xxxxxxxw", 8) == 0 && memcmp(b, "xxxxxxxx", 8) < 0);
	print_dec(0);
	print(" ");
	print_dec(18446744073709551615ull);
	print(" ");
	print_hex(0xfedcba9876543210ull);
	print_char('\n');
	outb(0x600, 0x11);
	outw(0x600, 0x2222);
	outl(0x600, 0x33333333);
	guest_assert(inb(0x600) == 0x44 && inw(0x600) == 0x4444 && inl(0x600) == 0x44444444);
	mmio_write32(0xe0000000, 0x55555555);
	guest_assert(mmio_read32(0xe0000000) == 0x66666666);
	return RETURNS;
}
"""


@needs_gcc
@pytest.mark.parametrize("ring", [0, 3])
def test_all_of_the_c_header_works_in_ring(tmp_path: Path, ring: int) -> None:
    source = tmp_path / "library.c"
    source.write_text(LIBRARY.replace("RETURNS", str(40 + ring)))
    guestlib.build_c([source], tmp_path / "library.elf")
    written: list[tuple[int, int]] = []

    def port(access: PioAccess) -> int | None:
        if not access.is_write:
            return {1: 0x44, 2: 0x4444, 4: 0x44444444}[access.size]
        written.append((access.size, access.value))
        return None

    def window(access: MmioAccess) -> int | None:
        if not access.is_write:
            return 0x66666666
        written.append((access.size, access.value))
        return None

    with pykvm.Machine("4M") as m:
        console = m.pio.fifo(0xE9)
        m.debug_exit()
        m.on_pio(0x600, port)
        m.on_mmio(0xE0000000, 0x1000, window)
        image = m.load_elf(tmp_path / "library.elf")
        m.cpu.enter(image.mode, image.entry, ring=ring, iopl=3)
        result = m.run(timeout=10)
        output = console.read()
    assert output == b"0 18446744073709551615 0xfedcba9876543210\n", result
    assert written == [(1, 0x11), (2, 0x2222), (4, 0x33333333), (4, 0x55555555)]
    assert (result.reason, result.code) == (reasons.DEBUG_EXIT, 40 + ring)


@needs_gcc
def test_a_failed_assertion_in_c_says_where_and_ends_with_1(tmp_path: Path) -> None:
    source = tmp_path / "wrong.c"
    source.write_text('#include "pykvm_guest.h"\nint main(void)\n{\n\tguest_assert(1 > 2);\n}\n')
    guestlib.build_c([source], tmp_path / "wrong.elf")
    output, result = run_guest(guestlib.resolve(str(tmp_path / "wrong.elf")))
    assert output == "assertion failed: 1 > 2, wrong.c:4\n"
    assert (result.reason, result.code) == (reasons.DEBUG_EXIT, 1)


@needs_gcc
def test_c_guest_built_here_runs_as_the_committed_one(tmp_path: Path) -> None:
    guest = guestlib.find("c-guest")
    assert guest.source is not None
    guest.image = tmp_path / "c-guest.elf"
    guestlib.build_c([guest.source], guest.image)
    output, result = run_guest(guest)
    assert (output, result.code) == (guest.expected_output, 0)
