"""Rules over the segment registers.

Nearly all are VMX's: SVM checks little (AMD APM Vol. 2 §15.5.1), and goes wrong later. KVM on
Intel repairs some of these itself (it sets accessed bits and makes TR busy) and, on processors
without "unrestricted guest", emulates the guest while others hold.

Section numbers of the SDM are those of the editions that have VM entries in chapter 26.
"""

from __future__ import annotations

from .regs import SEGMENTS, SYSTEM_SEGMENTS
from .ruleset import Rule, State, registrar
from .walk import canonical

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .ruleset import Hit

RULES: list[Rule] = []
rule = registrar(RULES)

GUEST_SEGMENTS = "Intel SDM Vol. 3C §26.3.1.2"
DATA = ("ds", "es", "fs", "gs")


@rule("cs.long-without-long-mode", "kvm", "Linux arch/x86/kvm/x86.c kvm_is_valid_sregs")
def _(s: State) -> Iterator[Hit]:
    """A 64-bit code segment needs long mode."""
    if s.segments["cs"].l and not (s.lme and s.pg):
        yield (
            "cs efer", f"CS.L=1, but long mode is off (EFER.LME={int(s.lme)}, CR0.PG={int(s.pg)})",
            "Clear CS.L, or set EFER.LME|LMA, CR4.PAE and CR0.PG with page tables in CR3",
        )  # fmt: skip


@rule("cs.l-and-d", "vmx svm", f"{GUEST_SEGMENTS}; AMD APM Vol. 2 §15.5.1")
def _(s: State) -> Iterator[Hit]:
    """64-bit code has D=0; both set is reserved."""
    cs = s.segments["cs"]
    if s.lma and cs.l and cs.db:
        yield (
            "cs", "CS.L=1 and CS.D/B=1 in long mode, a reserved combination",
            "Clear CS.db for 64-bit code, or CS.l for 32-bit code",
        )  # fmt: skip


@rule("cs.unusable", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """There is no running without a code segment."""
    if s.segments["cs"].unusable:
        yield "cs", "CS is marked unusable", "Clear CS.unusable, and describe a code segment"


@rule("cs.not-present", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """CS must be present."""
    if not s.segments["cs"].present:
        yield "cs", "CS.present=0", "Set CS.present"


@rule("cs.not-code", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """CS holds accessed code; or type 3, which real mode leaves behind (unrestricted guest)."""
    cs = s.segments["cs"]
    if not s.v86 and cs.type != 3 and not 8 <= cs.type <= 15:
        yield "cs", f"CS.type={cs.type} is no code segment", "Use type 11 (code, readable)"


@rule("cs.not-accessed", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """A loaded code segment has its accessed bit set."""
    cs = s.segments["cs"]
    if s.descriptors and 8 <= cs.type <= 15 and not cs.type & 1:
        yield "cs", f"CS.type={cs.type} lacks the accessed bit", f"Use type {cs.type | 1}"


@rule("cs.system-segment", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """CS is a code segment, not a system one."""
    if not s.v86 and not s.segments["cs"].s:
        yield "cs", "CS.S=0 makes CS a system segment", "Set CS.s"


@rule("cs.data-type-in-ring", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """CS of type 3 is tolerated in ring 0 only."""
    cs = s.segments["cs"]
    if not s.v86 and cs.type == 3 and cs.dpl:
        yield "cs", f"CS.type=3 (data) with CS.DPL={cs.dpl}", "Use type 11 for code outside ring 0"


@rule("cs.dpl-not-ss-dpl", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """Non-conforming code runs at its own DPL, which is that of SS."""
    cs, ss = s.segments["cs"], s.segments["ss"]
    if not s.v86 and 8 <= cs.type <= 11 and cs.dpl != ss.dpl:
        yield (
            "cs ss", f"CS.DPL={cs.dpl} but SS.DPL={ss.dpl} (the current privilege level)",
            "Give CS and SS the same DPL",
        )  # fmt: skip


@rule("cs.conforming-above-ss", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """Conforming code runs at a CPL at or above its DPL."""
    cs, ss = s.segments["cs"], s.segments["ss"]
    if not s.v86 and 12 <= cs.type <= 15 and cs.dpl > ss.dpl:
        yield (
            "cs ss", f"conforming CS.DPL={cs.dpl} is above SS.DPL={ss.dpl}",
            "Lower CS.DPL, or use a non-conforming type (11)",
        )  # fmt: skip


@rule("cs.dpl-not-rpl", "vmx", "Intel SDM Vol. 3A §5.5; Linux vmx.c code_segment_valid")
def _(s: State) -> Iterator[Hit]:
    """In protected mode the selector of running code carries the privilege level."""
    cs = s.segments["cs"]
    if s.descriptors and 8 <= cs.type <= 11 and cs.dpl != cs.selector & 3:
        yield (
            "cs", f"CS.DPL={cs.dpl} but its selector {cs.selector:#x} has RPL {cs.selector & 3}",
            f"Use selector {cs.selector & ~3 | cs.dpl & 3:#x}, or another DPL",
        )  # fmt: skip


@rule("ss.rpl-not-cs-rpl", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """SS and CS carry the same privilege level."""
    cs, ss = s.segments["cs"], s.segments["ss"]
    if s.descriptors and (cs.selector ^ ss.selector) & 3:
        yield (
            "ss cs", f"SS selector {ss.selector:#x} and CS selector {cs.selector:#x} differ in RPL",
            "Give both the RPL of the ring to run in",
        )  # fmt: skip


@rule("ss.dpl-not-rpl", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """The DPL of SS is the RPL of its selector."""
    ss = s.segments["ss"]
    if s.descriptors and ss.dpl != ss.selector & 3:
        yield (
            "ss", f"SS.DPL={ss.dpl} but its selector {ss.selector:#x} has RPL {ss.selector & 3}",
            f"Use selector {ss.selector & ~3 | ss.dpl & 3:#x}, or another DPL",
        )  # fmt: skip


@rule("ss.dpl-in-real-mode", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """Real mode is ring 0."""
    ss = s.segments["ss"]
    if s.real and ss.dpl:
        yield "ss cr0", f"SS.DPL={ss.dpl} in real mode (CR0.PE=0)", "Set SS.dpl to 0"


@rule("ss.type", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """A stack is writable, accessed data."""
    ss = s.segments["ss"]
    allowed = (3, 7) if s.descriptors else (2, 3, 6, 7)
    if not s.v86 and s.usable("ss") and ss.type not in allowed:
        yield "ss", f"SS.type={ss.type} is no writable, accessed data segment", "Use type 3"


@rule("ss.unusable", "cpu", "Intel SDM Vol. 3A §5.4.1")
def _(s: State) -> Iterator[Hit]:
    """Outside 64-bit code a stack needs a segment."""
    if s.segments["ss"].unusable and not s.code64:
        yield (
            "ss", "SS is unusable outside 64-bit code: the first push or call raises #SS",
            "Load a data segment into SS",
        )  # fmt: skip


@rule("data.not-accessed", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """A loaded segment has its accessed bit set."""
    for name, segment in s.loaded(*DATA):
        if s.descriptors and not segment.type & 1:
            yield (
                name, f"{name.upper()}.type={segment.type} lacks the accessed bit",
                f"Use type {segment.type | 1}",
            )  # fmt: skip


@rule("data.execute-only", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """Code may sit in a data register only if it can be read."""
    for name, segment in s.loaded(*DATA):
        if not s.v86 and segment.type & 0xA == 8:
            yield (
                name, f"{name.upper()}.type={segment.type} is code that cannot be read",
                "Use type 3 (data, writable, accessed)",
            )  # fmt: skip


@rule("data.system-segment", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """SS, DS, ES, FS and GS hold data or code, not system segments."""
    for name, segment in s.loaded("ss", *DATA):
        if not s.v86 and not segment.s:
            yield name, f"{name.upper()}.S=0 makes it a system segment", f"Set {name.upper()}.s"


@rule("data.dpl-below-rpl", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """A data segment is not more privileged than the selector that loaded it."""
    for name, segment in s.loaded(*DATA):
        rpl = segment.selector & 3
        if s.descriptors and segment.type <= 11 and segment.dpl < rpl:
            yield (
                name, f"{name.upper()}.DPL={segment.dpl} is below the RPL {rpl} of its selector "
                f"{segment.selector:#x}",
                f"Raise {name.upper()}.dpl to {rpl}, or clear the RPL",
            )  # fmt: skip


@rule("segment.granularity-low", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """A limit in pages ends in 0xfff."""
    for name, segment in s.loaded(*SEGMENTS, *SYSTEM_SEGMENTS):
        if not s.v86 and segment.g and segment.limit & 0xFFF != 0xFFF:
            yield (
                name, f"{name.upper()}.limit={segment.limit:#x} does not end in 0xfff, but G=1",
                f"Clear {name.upper()}.g, or use {segment.limit | 0xFFF:#x}; the limit is in bytes",
            )  # fmt: skip


@rule("segment.granularity-high", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """A limit of 1 MiB and more is one in pages."""
    for name, segment in s.loaded(*SEGMENTS, *SYSTEM_SEGMENTS):
        if not s.v86 and not segment.g and segment.limit >> 20:
            yield (
                name, f"{name.upper()}.limit={segment.limit:#x} has more than 20 bits, but G=0",
                f"Set {name.upper()}.g",
            )  # fmt: skip


@rule("segment.base-upper-bits", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """The bases of CS, SS, DS and ES have 32 bits."""
    for name, segment in s.loaded("cs", "ss", "ds", "es"):
        if not s.v86 and segment.base >> 32:
            yield (
                name, f"{name.upper()}.base={segment.base:#x} has more than 32 bits",
                f"Use a base below 4 GiB (0 in 64-bit code, where {name.upper()}.base is ignored)",
            )  # fmt: skip


@rule("segment.base-ignored", "cpu", "Intel SDM Vol. 3A §3.4.4")
def _(s: State) -> Iterator[Hit]:
    """64-bit code takes the bases of CS, SS, DS and ES as 0."""
    for name, segment in s.loaded("cs", "ss", "ds", "es"):
        if s.code64 and 0 < segment.base < 1 << 32:
            yield (
                name, f"{name.upper()}.base={segment.base:#x} is ignored by 64-bit code, as if 0",
                "Use 0 and put the offset into RIP or the pointers; FS and GS keep their bases",
            )  # fmt: skip


@rule("segment.base-non-canonical", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """The bases of FS, GS, TR and a usable LDTR are canonical."""
    for name in ("fs", "gs", "tr", "ldt"):
        base = s.segments[name].base
        checked = (name == "tr" or not s.v86) and (name != "ldt" or s.usable(name))
        if checked and not canonical(base, s.linear_bits):
            yield (
                name, f"{name.upper()}.base={base:#x} is not canonical",
                f"Make bits 63:{s.linear_bits - 1} equal",
            )  # fmt: skip


@rule("v8086.base", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """In virtual-8086 mode base = selector * 16."""
    for name in SEGMENTS if s.v86 else ():
        segment = s.segments[name]
        if segment.base != segment.selector << 4:
            yield (
                name, f"{name.upper()}.base={segment.base:#x}, but its selector "
                f"{segment.selector:#x} means {segment.selector << 4:#x} in virtual-8086 mode",
                "Set base to selector << 4",
            )  # fmt: skip


@rule("v8086.limit", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """In virtual-8086 mode every limit is 0xffff."""
    for name in SEGMENTS if s.v86 else ():
        limit = s.segments[name].limit
        if limit != 0xFFFF:
            yield (
                name, f"{name.upper()}.limit={limit:#x} in virtual-8086 mode", "Set it to 0xffff"
            )  # fmt: skip


@rule("v8086.access-rights", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """In virtual-8086 mode all segments are accessed, writable, ring-3 data."""
    for name in SEGMENTS if s.v86 else ():
        access = s.segments[name].access
        if access != 0xF3:
            yield (
                name,
                f"{name.upper()} has access rights {access:#x} in virtual-8086 mode, not 0xf3",
                "Set type=3 s=1 dpl=3 present=1, and avl, l, db, g and unusable to 0",
            )  # fmt: skip
