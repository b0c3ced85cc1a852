"""CPUID entries and MSR names."""

from __future__ import annotations

import pytest

from pykvm.arch.x86_64 import cpuid, msrs


class Entry:
    def __init__(self, function: int, index: int = 0, **registers: int) -> None:
        self.function, self.index = function, index
        self.eax = self.ebx = self.ecx = self.edx = 0
        for name, value in registers.items():
            setattr(self, name, value)


ENTRIES = [
    Entry(0, eax=0xD, ebx=0x68747541, edx=0x69746E65, ecx=0x444D4163),
    Entry(1, ecx=1 << 26 | 1 << 13, edx=1 << 6),
    Entry(7, ebx=1 << 7, ecx=1 << 16),
    Entry(7, 1, eax=1 << 26),
    Entry(0x80000001, edx=1 << 29 | 1 << 26),
    Entry(0x80000002, eax=0x20444D41, ebx=0x43595045),
    Entry(0x80000008, eax=48 << 8 | 40),
]


def test_a_leaf_is_found_by_function_and_index() -> None:
    assert cpuid.find(ENTRIES, 7, 1) is ENTRIES[3]
    assert cpuid.find(ENTRIES, 7) is ENTRIES[2]
    assert cpuid.find(ENTRIES, 0xB) is None


def test_features_have_the_names_of_proc_cpuinfo() -> None:
    assert cpuid.features(ENTRIES) == {
        "xsave", "cx16", "pae", "smep", "la57", "lam", "lm", "pdpe1gb",
    }  # fmt: skip
    assert cpuid.features([]) == frozenset()
    assert cpuid.features(iter(ENTRIES)) == cpuid.features(ENTRIES)


def test_widths_come_from_the_leaf_or_are_those_kvm_assumes() -> None:
    assert (cpuid.phys_bits(ENTRIES), cpuid.linear_bits(ENTRIES)) == (40, 48)
    assert (cpuid.phys_bits([]), cpuid.linear_bits([])) == (36, 48)


def test_vendor_and_brand_are_text() -> None:
    assert cpuid.vendor(ENTRIES) == "AuthenticAMD"
    assert cpuid.brand(ENTRIES) == "AMD EPYC"
    assert (cpuid.vendor([]), cpuid.brand([])) == ("", "")
    assert cpuid.vendor([Entry(0, ebx=0xFFFFFFFF)])  # any bytes are some text


def test_entries_print_with_their_meaning() -> None:
    text = cpuid.format_entries(ENTRIES)
    assert "0x00000007.1: eax 04000000" in text
    assert "vendor AuthenticAMD, 40 physical address bits" in text
    assert text.endswith("smep xsave")


def test_msrs_are_known_by_several_spellings() -> None:
    assert {msrs.number(name) for name in ("EFER", "efer", "MSR_EFER", 0xC0000080)} == {0xC0000080}
    assert msrs.number("IA32_TSC") == msrs.number("MSR_IA32_TSC") == 0x10
    assert msrs.number("MTRR_PHYSMASK7") == 0x20F
    assert msrs.number("IA32_P5_MC_ADDR") == msrs.number("P5_MC_ADDR") == 0


def test_an_msr_number_has_a_name_or_stays_a_number() -> None:
    assert msrs.name(0xC0000082) == "LSTAR"
    assert msrs.name(0x12345) == "0x12345"


@pytest.mark.parametrize("msr", ["NO_SUCH", "", -1, 1 << 32])
def test_what_is_no_msr_is_refused(msr: int | str) -> None:
    with pytest.raises(ValueError):
        msrs.number(msr)


def test_no_two_msrs_share_a_number() -> None:
    assert len(set(msrs.MSRS.values())) == len(msrs.MSRS)
