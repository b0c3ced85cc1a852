"""Names of model-specific registers: Intel SDM Vol. 4 chapter 2, AMD APM Vol. 2 appendix A.

KVM's own (MSR_KVM_*) come from the header, through ``pykvm._abi``, and are not repeated here.
"""

from __future__ import annotations

MSRS: dict[str, int] = {
    "IA32_P5_MC_ADDR": 0x0, "IA32_P5_MC_TYPE": 0x1, "TSC": 0x10, "APIC_BASE": 0x1B,
    "FEATURE_CONTROL": 0x3A, "TSC_ADJUST": 0x3B, "SPEC_CTRL": 0x48, "PRED_CMD": 0x49,
    "BIOS_SIGN_ID": 0x8B, "SMBASE": 0x9E, "MTRRCAP": 0xFE, "ARCH_CAPABILITIES": 0x10A,
    "SYSENTER_CS": 0x174, "SYSENTER_ESP": 0x175, "SYSENTER_EIP": 0x176, "MCG_CAP": 0x179,
    "MCG_STATUS": 0x17A, "MCG_CTL": 0x17B, "MISC_ENABLE": 0x1A0, "DEBUGCTL": 0x1D9,
    "MTRR_FIX64K_00000": 0x250, "MTRR_FIX16K_80000": 0x258, "MTRR_FIX16K_A0000": 0x259,
    "PAT": 0x277, "MTRR_DEF_TYPE": 0x2FF, "MC0_CTL": 0x400, "MC0_STATUS": 0x401,
    "MC0_ADDR": 0x402, "MC0_MISC": 0x403, "VMX_BASIC": 0x480, "TSC_DEADLINE": 0x6E0,
    "X2APIC_ID": 0x802, "X2APIC_VERSION": 0x803, "X2APIC_TPR": 0x808, "X2APIC_EOI": 0x80B,
    "X2APIC_LDR": 0x80D, "X2APIC_SIVR": 0x80F, "X2APIC_ICR": 0x830, "X2APIC_LVT_TIMER": 0x832,
    "X2APIC_INIT_COUNT": 0x838, "X2APIC_CUR_COUNT": 0x839, "X2APIC_DIV_CONF": 0x83E,
    "X2APIC_SELF_IPI": 0x83F, "U_CET": 0x6A0, "S_CET": 0x6A2, "PL0_SSP": 0x6A4,
    "PL3_SSP": 0x6A7, "XFD": 0x1C4, "XFD_ERR": 0x1C5, "XSS": 0xDA0,
    "EFER": 0xC0000080, "STAR": 0xC0000081, "LSTAR": 0xC0000082, "CSTAR": 0xC0000083,
    "SFMASK": 0xC0000084, "FS_BASE": 0xC0000100, "GS_BASE": 0xC0000101,
    "KERNEL_GS_BASE": 0xC0000102, "TSC_AUX": 0xC0000103, "TSC_RATIO": 0xC0000104,
    "SYSCFG": 0xC0010010, "HWCR": 0xC0010015, "VM_CR": 0xC0010114, "VM_HSAVE_PA": 0xC0010117,
    "VIRT_SPEC_CTRL": 0xC001011F, "DE_CFG": 0xC0011029,
} | {
    f"MTRR_PHYS{kind}{n}": 0x200 + 2 * n + step
    for n in range(8)
    for step, kind in enumerate(("BASE", "MASK"))
} | {f"MTRR_FIX4K_{0xC0000 + 0x8000 * n:X}": 0x268 + n for n in range(8)}  # fmt: skip
"""Name → number, without the ``MSR_`` or ``IA32_`` in front."""

_NAMES = {number: name for name, number in MSRS.items()}


def number(msr: int | str) -> int:
    """The number of an MSR given as a number or a name (``"EFER"``, ``"MSR_LSTAR"``).

    Raises:
        ValueError: no such name here, or a number that is no 32-bit one.
    """
    if isinstance(msr, str):
        name = msr.upper().removeprefix("MSR_").removeprefix("IA32_")
        found = MSRS.get(name, MSRS.get(f"IA32_{name}"))
        if found is None:
            raise ValueError(f"no MSR is called {msr!r} here: give its number")
        return found
    if not 0 <= msr < 1 << 32:
        raise ValueError(f"MSR {msr:#x}: the number has 32 bits")
    return msr


def name(msr: int) -> str:
    """The name of an MSR, or its number in hexadecimal."""
    return _NAMES.get(msr, f"{msr:#x}")
