"""What a list of CPUID entries offers: features by name, address widths, vendor.

Entries are any objects with ``function index eax ebx ecx edx``, such as the ``struct
kvm_cpuid_entry2`` of KVM_GET_SUPPORTED_CPUID. Feature names are those of /proc/cpuinfo.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

# (function, index, register) → {bit: name}. Intel SDM Vol. 2A, CPUID; AMD APM Vol. 3 appendix E.
FEATURES: dict[tuple[int, int, str], dict[int, str]] = {
    (1, 0, "edx"): {
        0: "fpu", 1: "vme", 2: "de", 3: "pse", 4: "tsc", 5: "msr", 6: "pae", 7: "mce", 8: "cx8",
        9: "apic", 11: "sep", 12: "mtrr", 13: "pge", 14: "mca", 15: "cmov", 16: "pat",
        17: "pse36", 19: "clflush", 23: "mmx", 24: "fxsr", 25: "sse", 26: "sse2", 28: "ht",
    },
    (1, 0, "ecx"): {
        0: "pni", 1: "pclmulqdq", 3: "monitor", 5: "vmx", 6: "smx", 9: "ssse3", 12: "fma",
        13: "cx16", 17: "pcid", 19: "sse4_1", 20: "sse4_2", 21: "x2apic", 22: "movbe",
        23: "popcnt", 24: "tsc_deadline_timer", 25: "aes", 26: "xsave", 27: "osxsave", 28: "avx",
        29: "f16c", 30: "rdrand", 31: "hypervisor",
    },
    (7, 0, "ebx"): {
        0: "fsgsbase", 1: "tsc_adjust", 3: "bmi1", 5: "avx2", 7: "smep", 8: "bmi2", 9: "erms",
        10: "invpcid", 16: "avx512f", 18: "rdseed", 19: "adx", 20: "smap", 23: "clflushopt",
        24: "clwb", 29: "sha_ni",
    },
    (7, 0, "ecx"): {
        2: "umip", 3: "pku", 4: "ospke", 7: "shstk", 9: "vaes", 16: "la57", 22: "rdpid",
    },
    (7, 0, "edx"): {4: "fsrm", 5: "uintr", 20: "ibt", 22: "amx_bf16", 24: "amx_tile"},
    (7, 1, "eax"): {4: "avx_vnni", 6: "lass", 17: "fred", 26: "lam"},
    (0x80000001, 0, "edx"): {
        11: "syscall", 20: "nx", 22: "mmxext", 25: "fxsr_opt", 26: "pdpe1gb", 27: "rdtscp",
        29: "lm",
    },
    (0x80000001, 0, "ecx"): {
        0: "lahf_lm", 2: "svm", 4: "cr8_legacy", 5: "abm", 6: "sse4a", 8: "3dnowprefetch",
        22: "topoext", 27: "perfctr_l2",
    },
    (0x80000008, 0, "ebx"): {0: "clzero", 2: "xsaveerptr", 9: "wbnoinvd"},
    (0x80000021, 0, "eax"): {8: "autoibrs"},
}  # fmt: skip

# KVM without a CPUID table assumes this width (Linux arch/x86/kvm/cpuid.c,
# cpuid_query_maxphyaddr).
DEFAULT_PHYS_BITS = 36


def find(entries: Iterable[Any], function: int, index: int = 0) -> Any | None:
    """The entry of a leaf (and sub-leaf), or None."""
    for entry in entries:
        if int(entry.function) == function and int(entry.index) == index:
            return entry
    return None


def features(entries: Iterable[Any]) -> frozenset[str]:
    """The names of all features these entries offer, among those known here."""
    entries = list(entries)
    found = set()
    for (function, index, register), names in FEATURES.items():
        entry = find(entries, function, index)
        if entry is not None:
            value = int(getattr(entry, register))
            found |= {name for bit, name in names.items() if value >> bit & 1}
    return frozenset(found)


def phys_bits(entries: Iterable[Any]) -> int:
    """Width of guest-physical addresses: leaf 0x80000008, or 36 as KVM assumes without it."""
    entry = find(entries, 0x80000008)
    return int(entry.eax) & 0xFF if entry is not None else DEFAULT_PHYS_BITS


def linear_bits(entries: Iterable[Any]) -> int:
    """Width of virtual addresses the processor can be told to use: 48, or 57 with LA57."""
    entry = find(entries, 0x80000008)
    return int(entry.eax) >> 8 & 0xFF if entry is not None else 48


def vendor(entries: Iterable[Any]) -> str:
    """``GenuineIntel``, ``AuthenticAMD``, …; "" without leaf 0."""
    entry = find(entries, 0)
    return "" if entry is None else _text(entry.ebx, entry.edx, entry.ecx)


def brand(entries: Iterable[Any]) -> str:
    """The processor's marketing name (leaves 0x80000002-4); "" if there is none."""
    entries = list(entries)
    leaves = [find(entries, 0x80000002 + number) for number in range(3)]
    return "".join(
        _text(leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) for leaf in leaves if leaf is not None
    ).strip()


def _text(*words: Any) -> str:
    raw = b"".join(int(word).to_bytes(4, "little") for word in words)
    return raw.rstrip(b"\0").decode("latin-1")


def format_entries(entries: Iterable[Any]) -> str:
    """Every entry in hexadecimal, a line each, and the known features in words below."""
    entries = list(entries)
    lines = [
        f"{int(e.function):#010x}.{int(e.index)}: eax {int(e.eax):08x} ebx {int(e.ebx):08x} "
        f"ecx {int(e.ecx):08x} edx {int(e.edx):08x}"
        for e in entries
    ]
    lines.append(f"vendor {vendor(entries)}, {phys_bits(entries)} physical address bits")
    lines.append("features: " + " ".join(sorted(features(entries))))
    return "\n".join(lines)
