"""Rules over CR0, CR3, CR4, CR8, EFER, the APIC base, RFLAGS, RIP and pending interrupts.

Section numbers of the SDM are those of the editions that have VM entries in chapter 26.
"""

from __future__ import annotations

from .regs import CR4_BITS, EFER_BITS
from .ruleset import Rule, State, registrar
from .walk import canonical

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .ruleset import Hit

RULES: list[Rule] = []
rule = registrar(RULES)

GUEST_CR = "Intel SDM Vol. 3C §26.3.1.1"
GUEST_RFLAGS = "Intel SDM Vol. 3C §26.3.1.4"
VMRUN = "AMD APM Vol. 2 §15.5.1"
KVM_SREGS = "Linux arch/x86/kvm/x86.c kvm_is_valid_sregs"

_CR4_KNOWN = sum(1 << bit for bit in CR4_BITS.values())
_EFER_KNOWN = sum(1 << bit for bit in EFER_BITS.values())
# CR4 bit → the CPUID features of which one must be offered (Linux arch/x86/kvm/x86.h,
# __cr4_reserved_bits).
CR4_FEATURES = {
    "UMIP": ("umip",), "LA57": ("la57",), "FSGSBASE": ("fsgsbase",), "PCIDE": ("pcid",),
    "OSXSAVE": ("xsave",), "SMEP": ("smep",), "SMAP": ("smap",), "PKE": ("pku",),
    "CET": ("shstk", "ibt"), "LASS": ("lass",), "LAM_SUP": ("lam",), "FRED": ("fred",),
}  # fmt: skip
# The rules about what CPUID must offer. KVM_SET_SREGS holds a VMM to them; what a guest writes
# itself, not every KVM checks.
BY_CPUID = frozenset(
    {"cr4.needs-cpuid", "cr4.vmxe", "efer.needs-cpuid", "apic-base.x2apic-needs-cpuid"}
)
EFER_FEATURES = {"LME": "lm", "LMA": "lm", "NXE": "nx", "FFXSR": "fxsr_opt", "AIBRSE": "autoibrs"}
_RFLAGS_RESERVED = ~0x3F7FD7 & (1 << 64) - 1  # bits 63:22, 15, 5, 3; bit 1 apart


@rule("cr0.pg-without-pe", "kvm vmx svm", f"{GUEST_CR}; {VMRUN}; {KVM_SREGS}")
def _(s: State) -> Iterator[Hit]:
    """Paging needs protected mode."""
    if s.pg and not s.pe:
        yield "cr0", f"CR0.PG=1 but CR0.PE=0 (CR0 {s.cr0:#x})", "Set CR0.PE too, or clear CR0.PG"


@rule("cr0.nw-without-cd", "kvm svm", f"Intel SDM Vol. 3A §11.5.1 table 11-5; {VMRUN}")
def _(s: State) -> Iterator[Hit]:
    """Not-write-through makes sense only with the cache disabled."""
    if s.cr0 >> 29 & 1 and not s.cr0 >> 30 & 1:
        yield "cr0", f"CR0.NW=1 but CR0.CD=0 (CR0 {s.cr0:#x})", "Clear CR0.NW, or set CR0.CD too"


@rule("cr0.upper-bits", "kvm svm", f"{VMRUN}; {KVM_SREGS}")
def _(s: State) -> Iterator[Hit]:
    """Bits 63:32 of CR0 must be 0."""
    if s.cr0 >> 32:
        yield "cr0", f"CR0 {s.cr0:#x} has bits set above bit 31", "Clear CR0[63:32]"


@rule("cr4.reserved-bits", "kvm vmx svm", f"{GUEST_CR}; {VMRUN}; {KVM_SREGS}")
def _(s: State) -> Iterator[Hit]:
    """Undefined bits of CR4 must be 0."""
    extra = s.cr4 & ~_CR4_KNOWN
    if extra:
        yield "cr4", f"CR4 {s.cr4:#x} has reserved bits set: {extra:#x}", "Clear them"


@rule("cr4.vmxe", "kvm", f"{KVM_SREGS}; Intel SDM Vol. 3C §23.7")
def _(s: State) -> Iterator[Hit]:
    """VMX in the guest needs nested virtualization."""
    if s.cr4 >> 13 & 1 and "vmx" not in (s.features or ()):
        yield (
            "cr4", f"CR4.VMXE=1 (CR4 {s.cr4:#x}), but the guest's CPUID does not offer VMX",
            "Clear CR4.VMXE, or offer VMX in CPUID where KVM has nested virtualization on",
        )  # fmt: skip


@rule("cr4.not-virtualized", "kvm", "Linux arch/x86/include/asm/kvm_host.h CR4_RESERVED_BITS")
def _(s: State) -> Iterator[Hit]:
    """Some bits exist in hardware, but KVM offers them to no guest."""
    names = [n for n in ("SMXE", "KL", "PKS", "UINTR") if s.cr4 >> CR4_BITS[n] & 1]
    if names:
        yield (
            "cr4", f"CR4.{'/'.join(names)} set (CR4 {s.cr4:#x}), which KVM does not virtualize",
            "Clear the bit",
        )  # fmt: skip


@rule("cr4.needs-cpuid", "kvm", "Linux arch/x86/kvm/x86.h __cr4_reserved_bits")
def _(s: State) -> Iterator[Hit]:
    """A feature is switched on that the guest's CPUID does not offer."""
    if s.features is None:
        return
    for name, wanted in CR4_FEATURES.items():
        if s.cr4 >> CR4_BITS[name] & 1 and not s.features.intersection(wanted):
            yield (
                "cr4", f"CR4.{name}=1, but the guest's CPUID does not offer {' or '.join(wanted)}",
                f"Set CPUID before the registers, with {' or '.join(wanted)}, or clear the bit",
            )  # fmt: skip


@rule("cr4.pcide-without-long-mode", "vmx", GUEST_CR)
def _(s: State) -> Iterator[Hit]:
    """Process-context identifiers exist in IA-32e mode only."""
    if s.cr4 >> 17 & 1 and not s.lma:
        yield (
            "cr4 efer", f"CR4.PCIDE=1 (CR4 {s.cr4:#x}) outside long mode (EFER.LMA=0)",
            "Clear CR4.PCIDE, or enter long mode",
        )  # fmt: skip


@rule("cr4.cet-without-wp", "kvm vmx svm", f"{GUEST_CR}; AMD APM Vol. 2 §18.2")
def _(s: State) -> Iterator[Hit]:
    """Shadow stacks rely on write protection."""
    if s.cr4 >> 23 & 1 and not s.cr0 >> 16 & 1:
        yield "cr4 cr0", f"CR4.CET=1 but CR0.WP=0 (CR0 {s.cr0:#x})", "Set CR0.WP"


@rule("efer.lme-without-pae", "kvm vmx svm", f"{GUEST_CR}; {VMRUN}; {KVM_SREGS}")
def _(s: State) -> Iterator[Hit]:
    """Long mode uses PAE tables."""
    if s.lme and s.pg and not s.cr4 >> 5 & 1:
        yield (
            "efer cr4", f"EFER.LME=1 and CR0.PG=1 but CR4.PAE=0 (CR4 {s.cr4:#x})",
            "Set CR4.PAE (0x20)",
        )  # fmt: skip


@rule("efer.lme-without-lma", "kvm vmx", f"{GUEST_CR}; {KVM_SREGS}")
def _(s: State) -> Iterator[Hit]:
    """A processor sets LMA by itself when paging goes on; KVM wants it spelled out."""
    if s.lme and s.pg and not s.lma:
        yield (
            "efer cr0", f"EFER.LME=1 and CR0.PG=1 but EFER.LMA=0 (EFER {s.efer:#x})",
            f"Set EFER.LMA too (EFER {s.efer | 0x400:#x})",
        )  # fmt: skip


@rule("efer.lma-without-pg", "kvm vmx", f"{GUEST_CR}; {KVM_SREGS}")
def _(s: State) -> Iterator[Hit]:
    """Long mode is active only under paging."""
    if s.lma and not s.pg:
        yield (
            "efer cr0", f"EFER.LMA=1 but CR0.PG=0 (CR0 {s.cr0:#x})",
            "Set CR0.PG with page tables in CR3, or clear EFER.LMA",
        )  # fmt: skip


@rule("efer.lma-without-lme", "kvm vmx", f"{GUEST_CR}; {KVM_SREGS}")
def _(s: State) -> Iterator[Hit]:
    """Long mode is active only where it is enabled."""
    if s.lma and not s.lme:
        yield (
            "efer", f"EFER.LMA=1 but EFER.LME=0 (EFER {s.efer:#x})",
            f"Set EFER.LME too (EFER {s.efer | 0x100:#x})",
        )  # fmt: skip


@rule("efer.reserved-bits", "kvm vmx svm", f"{GUEST_CR}; {VMRUN}")
def _(s: State) -> Iterator[Hit]:
    """Undefined bits of EFER must be 0."""
    extra = s.efer & ~_EFER_KNOWN
    if extra:
        yield "efer", f"EFER {s.efer:#x} has reserved bits set: {extra:#x}", "Clear them"


@rule("efer.svme", "kvm vmx", f"Linux arch/x86/kvm/x86.c kvm_valid_efer; {GUEST_CR}")
def _(s: State) -> Iterator[Hit]:
    """SVM in the guest needs nested virtualization."""
    if s.efer >> 12 & 1 and "svm" not in (s.features or ()):
        yield (
            "efer", f"EFER.SVME=1 (EFER {s.efer:#x}), but the guest's CPUID does not offer SVM",
            "Clear EFER.SVME: KVM sets the hardware's own",
        )  # fmt: skip


@rule("efer.needs-cpuid", "kvm", "Linux arch/x86/kvm/x86.c __kvm_valid_efer")
def _(s: State) -> Iterator[Hit]:
    """A feature is switched on that the guest's CPUID does not offer."""
    if s.features is None:
        return
    for name, wanted in EFER_FEATURES.items():
        if s.efer >> EFER_BITS[name] & 1 and wanted not in s.features:
            yield (
                "efer", f"EFER.{name}=1, but the guest's CPUID does not offer {wanted}",
                f"Set CPUID before the registers, with {wanted}, or clear the bit",
            )  # fmt: skip


@rule("cr3.beyond-physical-width", "kvm vmx svm", f"{GUEST_CR}; {VMRUN}; {KVM_SREGS}")
def _(s: State) -> Iterator[Hit]:
    """CR3 must be a physical address the guest can have."""
    lam = 3 << 61 if "lam" in (s.features or ()) else 0
    if (s.cr3 & ~lam) >> s.phys_bits:
        yield (
            "cr3", f"CR3 {s.cr3:#x} is beyond the guest's {s.phys_bits} physical address bits",
            "Point CR3 to the root page table in guest RAM",
        )  # fmt: skip


@rule("cr3.ignored-bits", "cpu", "Intel SDM Vol. 3A §4.3, §4.4.1, §4.5 tables 4-3, 4-7, 4-12")
def _(s: State) -> Iterator[Hit]:
    """Low bits of CR3 are no part of the table's address."""
    if not s.pg or (s.lma and s.cr4 >> 17 & 1):  # with PCIDE they are the PCID
        return
    pae = bool(s.cr4 >> 5 & 1) and not s.lma
    low = s.cr3 & (0x7 if pae else 0xFE7)
    if low:
        table = s.cr3 & ~(0x1F if pae else 0xFFF)
        yield (
            "cr3", f"CR3 {s.cr3:#x} is not aligned: the processor takes {table:#x} for the root",
            f"Align the root page table to {32 if pae else 4096} bytes",
        )  # fmt: skip


@rule("cr8.above-15", "cpu", "Intel SDM Vol. 3A §10.8.6")
def _(s: State) -> Iterator[Hit]:
    """The task priority has four bits."""
    if s.cr8 > 15:
        yield (
            "cr8", f"CR8 {s.cr8:#x} is above 15: KVM drops it, MOV to CR8 would raise #GP",
            "Use 0 to 15",
        )  # fmt: skip


@rule("apic-base.reserved-bits", "kvm", "Linux arch/x86/kvm/x86.c kvm_set_apic_base")
def _(s: State) -> Iterator[Hit]:
    """Bits 7:0 and 9, and those beyond the physical width, must be 0."""
    extra = s.apic_base & (0x2FF | (1 << 64) - (1 << s.phys_bits))
    if extra:
        yield (
            "apic_base", f"APIC_BASE {s.apic_base:#x} has reserved bits set: {extra:#x}",
            "Use the value that KVM_GET_SREGS gave, 0xfee00900 on the boot processor",
        )  # fmt: skip


@rule("apic-base.x2apic-without-enable", "kvm", "Intel SDM Vol. 3A §10.12.1 table 10-5")
def _(s: State) -> Iterator[Hit]:
    """x2APIC mode is a mode of an enabled APIC."""
    if s.apic_base >> 10 & 3 == 1:
        yield (
            "apic_base", f"APIC_BASE {s.apic_base:#x} has X2APIC (bit 10) without ENABLE (bit 11)",
            "Set both, or neither",
        )  # fmt: skip


@rule("apic-base.x2apic-needs-cpuid", "kvm", "Linux arch/x86/kvm/x86.c kvm_set_apic_base")
def _(s: State) -> Iterator[Hit]:
    """x2APIC mode is on, but the guest's CPUID does not offer it."""
    if s.features is not None and s.apic_base >> 10 & 1 and "x2apic" not in s.features:
        yield (
            "apic_base", f"APIC_BASE {s.apic_base:#x} has X2APIC, CPUID does not offer x2apic",
            "Set CPUID before the registers, or clear bit 10",
        )  # fmt: skip


@rule("rflags.bit1-clear", "vmx", GUEST_RFLAGS)
def _(s: State) -> Iterator[Hit]:
    """Bit 1 of RFLAGS is always 1."""
    if s.rflags is not None and not s.rflags & 2:
        yield (
            "rflags", f"RFLAGS {s.rflags:#x} has bit 1 clear (KVM_SET_REGS sets it)",
            f"Use {s.rflags | 2:#x}",
        )  # fmt: skip


@rule("rflags.reserved-bits", "vmx", GUEST_RFLAGS)
def _(s: State) -> Iterator[Hit]:
    """Bits 63:22, 15, 5 and 3 of RFLAGS must be 0."""
    extra = (s.rflags or 0) & _RFLAGS_RESERVED
    if extra:
        yield "rflags", f"RFLAGS {s.rflags:#x} has reserved bits set: {extra:#x}", "Clear them"


@rule("rflags.vm-in-long-mode", "vmx", GUEST_RFLAGS)
def _(s: State) -> Iterator[Hit]:
    """There is no virtual-8086 mode in long mode."""
    if (s.rflags or 0) >> 17 & 1 and s.lma:
        yield "rflags efer", "RFLAGS.VM=1 in long mode (EFER.LMA=1)", "Clear RFLAGS.VM (bit 17)"


@rule("rflags.vm-in-real-mode", "vmx", GUEST_RFLAGS)
def _(s: State) -> Iterator[Hit]:
    """Virtual-8086 mode is a mode of protected mode."""
    if (s.rflags or 0) >> 17 & 1 and not s.pe:
        yield "rflags cr0", "RFLAGS.VM=1 in real mode (CR0.PE=0)", "Clear RFLAGS.VM, or set CR0.PE"


@rule("rip.upper-bits", "vmx cpu", GUEST_RFLAGS)
def _(s: State) -> Iterator[Hit]:
    """Outside 64-bit code RIP has 32 bits."""
    if s.rip is not None and not s.code64 and s.rip >> 32:
        yield (
            "rip cs", f"RIP {s.rip:#x} has bits set above bit 31, but this is not 64-bit code "
            f"(EFER.LMA={int(s.lma)}, CS.L={s.segments['cs'].l})",
            "Clear RIP[63:32], or enter 64-bit mode",
        )  # fmt: skip


@rule("rip.non-canonical", "vmx cpu", GUEST_RFLAGS)
def _(s: State) -> Iterator[Hit]:
    """In 64-bit code RIP must be canonical."""
    if s.rip is not None and s.code64 and not canonical(s.rip, s.linear_bits):
        yield (
            "rip", f"RIP {s.rip:#x} is not canonical: bits 63:{s.linear_bits - 1} must be equal",
            "Start at an address the page tables can map",
        )  # fmt: skip


@rule("rip.beyond-cs-limit", "cpu", "Intel SDM Vol. 3A §5.3")
def _(s: State) -> Iterator[Hit]:
    """A fetch beyond the limit of CS raises #GP."""
    cs = s.segments["cs"]
    if s.rip is not None and not s.code64 and cs.limit < s.rip < 1 << 32:
        yield (
            "rip cs", f"RIP {s.rip:#x} is beyond the limit of CS ({cs.limit:#x}): the first "
            "instruction raises #GP",
            "Raise CS.limit (0xffffffff with CS.g=1), or use CS.base so that RIP is small",
        )  # fmt: skip


@rule("interrupt.if-clear", "vmx", GUEST_RFLAGS)
def _(s: State) -> Iterator[Hit]:
    """An external interrupt is only injected into a guest that accepts it."""
    if s.pending and s.rflags is not None and not s.rflags >> 9 & 1:
        yield (
            "interrupt_bitmap rflags", f"interrupt_bitmap asks for vector {s.pending[0]}, but "
            "RFLAGS.IF=0",
            "Clear interrupt_bitmap, or set RFLAGS.IF (0x200)",
        )  # fmt: skip


@rule("interrupt.exception-vector", "cpu", "Intel SDM Vol. 3A §6.2")
def _(s: State) -> Iterator[Hit]:
    """Vectors 0 to 31 belong to exceptions."""
    low = [vector for vector in s.pending if vector < 32]
    if low:
        yield (
            "interrupt_bitmap", f"interrupt_bitmap has vector {low[0]} set, an exception's",
            "Use vectors 32 to 255 for interrupts, KVM_SET_VCPU_EVENTS for exceptions",
        )  # fmt: skip


@rule("interrupt.several", "cpu", "Linux arch/x86/kvm/x86.c __set_sregs")
def _(s: State) -> Iterator[Hit]:
    """KVM takes the lowest vector and forgets the others."""
    if len(s.pending) > 1:
        vectors = ", ".join(map(str, s.pending[:4]))
        yield (
            "interrupt_bitmap", f"interrupt_bitmap has {len(s.pending)} vectors set ({vectors}"
            f"{', …' if len(s.pending) > 4 else ''}): KVM injects the lowest only",
            "Set one bit; raise the others through the APIC",
        )  # fmt: skip
