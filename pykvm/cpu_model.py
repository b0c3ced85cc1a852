"""The CPUID that a guest sees: what KVM supports here, with topology, and features by name.

Made of KVM_GET_SUPPORTED_CPUID (api.rst 4.46). What that leaves to us: APIC IDs and the number of
processors, and the features that depend on how the machine is made (Intel SDM Vol. 2A, CPUID; AMD
APM Vol. 3 appendix E).
"""

from __future__ import annotations

from pykvm.kvm import new_cpuid2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TOPOLOGY_LEAVES = (0xB, 0x1F)
THREADS, CORES = 1, 2


def parse_features(text: str) -> dict[str, bool]:
    """``"-xsave,-avx,+x2apic"`` as ``{"xsave": False, …}``; names as in /proc/cpuinfo.

    Raises:
        ValueError: a name that is not known here; the message has those that are near.
    """
    from pykvm.arch.x86_64.cpuid import FEATURES

    wanted: dict[str, bool] = {}
    known = {name for names in FEATURES.values() for name in names.values()}
    for item in filter(None, (part.strip() for part in text.split(","))):
        sign, name = (item[0], item[1:]) if item[0] in "+-" else ("+", item)
        if name not in known:
            from difflib import get_close_matches

            near = get_close_matches(name, known, 3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"no CPUID feature is called {name!r}{hint}")
        wanted[name] = sign == "+"
    return wanted


def prepare(
    entries: list[Any], index: int, count: int, *, irqchip: bool, features: dict[str, bool]
) -> Any:
    """The ``struct kvm_cpuid2 *`` of vCPU ``index`` of ``count``: one package, one thread a core.

    Args:
        entries: what KVM supports.
        irqchip: the LAPIC is in the kernel, so its TSC-deadline timer is there.
        features: from :func:`parse_features`; those that KVM does not support stay off.
    """
    cpuid = new_cpuid2(_with_topology(entries, count))
    bits = (count - 1).bit_length()
    seen: dict[int, int] = {}
    for entry in cpuid.entries[0 : cpuid.nent]:
        if entry.function == 1:
            entry.ebx = entry.ebx & 0xFFFF | (count & 0xFF) << 16 | (index & 0xFF) << 24
            entry.edx = entry.edx & ~(1 << 28) | (count > 1) << 28  # ht: the count is valid
            entry.ecx |= 1 << 31  # a hypervisor is there: older kernels leave it to us to say so
            if irqchip:
                entry.ecx |= 1 << 24  # TSC deadline: KVM has it, but leaves it to us to say so
        elif entry.function == 4:
            # How many processors share this cache: private up to level 2, then all.
            shared = count if entry.eax >> 5 & 7 >= 3 else 1
            entry.eax = entry.eax & 0x3FFF | (shared - 1) << 14 | (count - 1) << 26
        elif entry.function in TOPOLOGY_LEAVES and count > 1:
            entry.index = seen[entry.function] = seen.get(entry.function, -1) + 1
            _topology(entry, index, count, bits)
        elif entry.function == 0x80000008:
            entry.ecx = entry.ecx & ~0xF0FF | (count - 1) & 0xFF | bits << 12
        elif entry.function == 0x8000001E:
            entry.eax, entry.ebx, entry.ecx = index, index & 0xFF, 0
        if features:
            _apply(entry, features)
    return cpuid


def _with_topology(entries: list[Any], count: int) -> list[Any]:
    """Leaves 0BH and 1FH with three sub-leaves: threads, cores, and one that ends the list.

    KVM offers the first; the others begin as copies of it.
    """
    whole = [e for e in entries if not (e.function in TOPOLOGY_LEAVES and e.index)]
    if count > 1:
        whole += [e for e in whole if e.function in TOPOLOGY_LEAVES for _ in range(2)]
    return whole


def _topology(entry: Any, index: int, count: int, bits: int) -> None:
    entry.edx = index
    level = entry.index
    if level == 0:
        entry.eax, entry.ebx, entry.ecx = 0, 1, THREADS << 8
    elif level == 1:
        entry.eax, entry.ebx, entry.ecx = bits, count, CORES << 8 | 1
    else:
        entry.eax, entry.ebx, entry.ecx = 0, 0, level


def _apply(entry: Any, features: dict[str, bool]) -> None:
    from pykvm.arch.x86_64.cpuid import FEATURES

    for register in ("eax", "ebx", "ecx", "edx"):
        names = FEATURES.get((entry.function, entry.index, register))
        if names:
            value = getattr(entry, register)
            for bit, name in names.items():
                if features.get(name) is False:
                    value &= ~(1 << bit)
            setattr(entry, register, value)
