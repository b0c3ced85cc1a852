"""The tables that a kernel reads: judged by ACPICA's own compiler, and by plain checks."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.arch.x86_64 import aml, pc
from pykvm.arch.x86_64.acpi import Acpi, build_acpi
from pykvm.arch.x86_64.acpi_format import HEADER, Table, io_register
from pykvm.arch.x86_64.acpi_tables import (
    Dsdt,
    Facs,
    Fadt,
    GenerationId,
    Madt,
    Rsdp,
    Rsdt,
    Xsdt,
)

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "one processor": {"cpus": 1},
    "two, and devices": {
        "cpus": 2, "virtio": [(0xD000_0000 + n * 0x1000, 0x1000, 16 + n) for n in range(4)],
    },
    "a PCI bus": {"cpus": 1, "pci": True},
    "bare": {"cpus": 1, "com1": False, "pvpanic": None, "timer_pin": 0},
    "everything else": {
        "cpus": 16, "rtc": True, "edge": False, "base": 0xF0000, "pm_base": 0xB000,
        "virtio": [(0xFEB0_0000, 0x200, 5)], "pvpanic": 0x600,
    },
    "x2apic": {"cpus": 300},
    "an identity": {"cpus": 1, "generation_id": bytes(range(16))},
    "holes in the APIC ids": {"cpus": [0, 1, 4, 5, 256]},
}  # fmt: skip


@pytest.fixture(params=CONFIGURATIONS)
def acpi(request: pytest.FixtureRequest) -> Acpi:
    return build_acpi(**CONFIGURATIONS[request.param])


def table(acpi: Acpi, kind: type[Any]) -> Any:
    (found,) = (each for _, each in acpi.tables if isinstance(each, kind))
    return found


# ---- ACPICA's judgement ------------------------------------------------------------------------


@pytest.fixture
def iasl(tmp_path: Path) -> Callable[..., str]:
    """Run iasl in an empty folder; its complaints fail the test."""
    program = shutil.which("iasl")
    if program is None:
        pytest.skip("iasl is not on PATH (Debian: acpica-tools)")

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [program, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        for line in said.splitlines():
            if "Compilation successful" in line:
                assert "0 Errors, 0 Warnings, 0 Remarks" in line
            else:
                assert not any(word in line for word in ("Error", "Warning", "Remark")), said
        return said

    return run


def test_iasl_takes_every_table_apart_and_compiles_it_again(
    acpi: Acpi, iasl: Callable[..., str], tmp_path: Path
) -> None:
    tables = [each for _, each in acpi.tables if not isinstance(each, (Rsdp, GenerationId))]
    assert len(tables) == 6
    for each in tables:
        name = each.SIGNATURE.decode().lower()
        (tmp_path / f"{name}.dat").write_bytes(each.encode())
        iasl("-d", f"{name}.dat")
        text = (tmp_path / f"{name}.dsl").read_text()
        assert "Error" not in text and "Warning" not in text and "Invalid" not in text, text
        # -oa: without optimizations, which shorten a path.
        assert "Compilation successful" in iasl("-oa", "-p", f"again_{name}", f"{name}.dsl")
        again = (tmp_path / f"again_{name}.aml").read_bytes()
        ours = each.encode()
        if isinstance(each, Facs):
            assert again == ours
        else:  # the header names the compiler
            assert again[HEADER.size :] == ours[HEADER.size :]


def test_iasl_complains_of_what_is_wrong(iasl: Callable[..., str], tmp_path: Path) -> None:
    """The judge is awake: a device without what it is to have, a damaged checksum."""
    (tmp_path / "bad.dat").write_bytes(Dsdt(aml.device("DEV0", aml.name("_CRS", b"\x0c"))).encode())
    with pytest.raises(AssertionError):
        iasl("-d", "bad.dat")
        iasl("-p", "again", "bad.dsl")


# ---- what a kernel does with them --------------------------------------------------------------


def test_a_kernel_that_follows_the_pointers_finds_every_table(acpi: Acpi) -> None:
    memory = bytearray(1 << 20)
    acpi.write(memory)

    found = [at for at in range(0xE0000, 1 << 20, 16) if memory[at : at + 8] == b"RSD PTR "]
    assert found == [acpi.rsdp]
    root = Rsdp.decode(bytes(memory[acpi.rsdp :]))
    xsdt = Xsdt.decode(bytes(memory[root.xsdt :]))
    assert Rsdt.decode(bytes(memory[root.rsdt :])).addresses == xsdt.addresses
    fadt_at, madt_at = xsdt.addresses
    fadt = Fadt.decode(bytes(memory[fadt_at:]))
    assert fadt == table(acpi, Fadt)
    assert Madt.decode(bytes(memory[madt_at:])) == table(acpi, Madt)
    assert Dsdt.decode(bytes(memory[fadt.members["dsdt"] :])) == table(acpi, Dsdt)
    assert fadt.members["x_dsdt"] == fadt.members["dsdt"]
    facs_at = fadt.members["firmware_ctrl"]
    assert facs_at % 64 == 0
    assert Facs.decode(bytes(memory[facs_at:])).encode() == table(acpi, Facs).encode()


def test_tables_do_not_overlap_and_print_in_full(acpi: Acpi) -> None:
    end = acpi.base
    for address, each in acpi.tables:
        assert address >= end
        end = address + len(each.encode())
        assert "decode" not in repr(each)
    assert end == acpi.base + len(acpi.blob)
    text = repr(acpi)
    assert "I/O port 0xcf9, 8 bits" in text
    assert "Package () {0x5, 0x5, Zero, Zero}" in text


def test_the_fadt_describes_the_hardware_that_there_is() -> None:
    fadt = Fadt(**table(build_acpi(cpus=1, pm_base=0x800), Fadt).members)
    members = fadt.members
    assert len(fadt.encode()) == 276
    assert (members["pm1a_evt_blk"], members["pm1a_cnt_blk"], members["pm_tmr_blk"]) == (
        0x800, 0x804, 0x808,
    )  # fmt: skip
    assert members["x_pm1a_cnt_blk"] == io_register(0x804, 2)
    assert members["sci_int"] == 9
    assert (members["reset_reg"], members["reset_value"]) == (io_register(0xCF9, 1), 6)
    assert members["smi_cmd"] == 0  # in ACPI mode from the start
    flags, arch = members["flags"], members["iapc_boot_arch"]
    assert flags & Fadt.RESET_REG_SUP and flags & Fadt.TMR_VAL_EXT
    assert not flags & 1 << 20  # not hardware-reduced
    assert not flags & 1 << 4  # the power button is fixed hardware
    assert not arch & Fadt.I8042
    assert arch & Fadt.CMOS_RTC_NOT_PRESENT
    with pytest.raises(TypeError, match="sci_irq"):
        Fadt(sci_irq=9)


def entries(acpi: Acpi, kind: str) -> list[dict[str, Any]]:
    return [members for each, members in table(acpi, Madt).entries if each == kind]


def test_the_madt_has_every_processor_once() -> None:
    acpi = build_acpi(cpus=[0, 2, 254, 255, 256])
    assert [m["apic_id"] for m in entries(acpi, "local-apic")] == [0, 2, 254]
    assert [m["apic_id"] for m in entries(acpi, "local-x2apic")] == [255, 256]
    uids = [m["uid"] for kind in ("local-apic", "local-x2apic") for m in entries(acpi, kind)]
    assert uids == [0, 1, 2, 3, 4]
    assert all(m["flags"] == 1 for m in entries(acpi, "local-apic"))
    assert entries(acpi, "local-x2apic-nmi")
    assert not entries(build_acpi(cpus=255), "local-x2apic-nmi")
    for uid in uids:
        assert f"(C{uid:03X})" in repr(table(acpi, Dsdt))


def test_without_pics_the_madt_says_so_and_the_timer_has_no_override() -> None:
    acpi = build_acpi(cpus=1, pic=False)
    assert table(acpi, Madt).flags == 0
    assert [members["source"] for members in entries(acpi, "override")] == [pc.SCI_GSI]
    assert table(build_acpi(cpus=1), Madt).flags == Madt.PCAT_COMPAT


def test_the_madts_overrides_are_those_of_the_routes() -> None:
    def wiring(acpi: Acpi) -> dict[int, tuple[int, int]]:
        return {m["source"]: (m["gsi"], m["flags"]) for m in entries(acpi, "override")}

    assert wiring(build_acpi(cpus=1)) == {0: (2, 0), 9: (9, 0xD)}
    assert wiring(build_acpi(cpus=1, timer_pin=0)) == {9: (9, 0xD)}
    for timer_pin in (0, 2):
        to = {g: pin for g, chip, pin in pc.gsi_routes(timer_pin) if chip == "ioapic"}
        told = wiring(build_acpi(cpus=1, timer_pin=timer_pin))
        for gsi in set(to) & set(range(16)):
            assert told.get(gsi, (gsi, 0))[0] == to[gsi]


def test_the_dsdt_has_the_devices_asked_for() -> None:
    text = repr(table(build_acpi(cpus=1, virtio=[(0xD0001000, 0x200, 17)]), Dsdt))
    assert "IO (0x3f8, 8), IRQ (4)" in text
    assert 'Name (_HID, "LNRO0005")' in text
    assert "Memory32Fixed (0xd0001000, 0x200), Interrupt (17, Edge)" in text
    assert 'Name (_HID, "QEMU0001")' in text
    assert "PNP0B00" not in text
    bare = repr(table(build_acpi(cpus=1, com1=False, pvpanic=None), Dsdt))
    assert "COM1" not in bare and "QEMU0001" not in bare


def test_the_vm_generation_id_is_where_the_device_says_and_can_be_notified() -> None:
    value = bytes(range(0xF0, 0x100))
    acpi = build_acpi(cpus=2, generation_id=value, base=0xE4000)
    memory = bytearray(1 << 20)
    acpi.write(memory)
    gpa = acpi.generation_id
    assert gpa is not None and gpa % 8 == 0
    assert memory[gpa : gpa + 16] == value
    text = repr(table(acpi, Dsdt))
    assert f"Name (ADDR, Package () {{{gpa:#x}, Zero}})" in text
    assert 'Name (_CID, "VM_Gen_Counter")' in text
    assert f"Interrupt ({pc.IDENTITY_GSI}, Edge)" in text
    assert "Notify (VGEN, 0x80)" in text
    bare = build_acpi(cpus=2)
    assert bare.generation_id is None and "VGEN" not in repr(bare) and "GED" not in repr(bare)


def test_the_identitys_interrupt_is_nobody_elses() -> None:
    assert pc.IDENTITY_GSI not in (pc.COM1_GSI, pc.SCI_GSI, pc.TIMER_IRQ, *pc.VIRTIO_GSIS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus": 1, "generation_id": b"short"}, "16 bytes"),
        ({"cpus": 1, "base": 0xE0010}, "64-byte boundary"),
        ({"cpus": 1, "base": 1 << 32}, "64-byte boundary"),
        ({"cpus": 16, "base": 0xFFF00}, "pass 0x100000"),
        ({"cpus": 0}, "at least one"),
        ({"cpus": []}, "at least one"),
    ],
)
def test_what_cannot_be_placed_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_acpi(**options)


# ---- decoding ----------------------------------------------------------------------------------

ALL: list[type[Any]] = [Rsdp, Rsdt, Xsdt, Fadt, Madt, Dsdt, Facs]


@pytest.mark.parametrize("kind", ALL)
@given(data=st.data())
def test_a_damaged_table_is_refused_or_reads_as_something(
    kind: type[Any], data: st.DataObject
) -> None:
    raw = bytearray(table(build_acpi(cpus=3), kind).encode())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(raw)))
    if data.draw(st.booleans()) and issubclass(kind, Table):  # a forger minds the checksum
        raw[9] = raw[9] - sum(raw) & 0xFF
    for damaged in (bytes(raw), bytes(raw[:cut])):
        try:
            repr(kind.decode(damaged))
        except ValueError as error:
            assert str(error)


@pytest.mark.parametrize("kind", [Rsdt, Xsdt, Fadt, Madt, Dsdt])
def test_a_wrong_byte_anywhere_breaks_the_checksum(kind: type[Any]) -> None:
    raw = table(build_acpi(cpus=1), kind).encode()
    assert kind.decode(raw + b"what follows").encode() == raw
    for at in range(8, len(raw)):
        damaged = raw[:at] + bytes([raw[at] ^ 0x40]) + raw[at + 1 :]
        with pytest.raises(ValueError, match="sum up"):
            kind.decode(damaged)


def test_the_root_pointer_has_two_checksums() -> None:
    raw = Rsdp(0x1000, 0x2000).encode()
    assert sum(raw[:20]) & 0xFF == sum(raw) & 0xFF == 0
    for at in (16, 24):
        with pytest.raises(ValueError, match="sum up"):
            Rsdp.decode(raw[:at] + b"\x77" + raw[at + 1 :])
