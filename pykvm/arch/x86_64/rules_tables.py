"""Rules over TR, LDTR, GDTR and IDTR. Nearly all are VMX's, as those over segments are."""

from __future__ import annotations

from .rules_segments import GUEST_SEGMENTS
from .ruleset import Rule, State, registrar
from .walk import canonical

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .ruleset import Hit

RULES: list[Rule] = []
rule = registrar(RULES)

GUEST_TABLES = "Intel SDM Vol. 3C §26.3.1.3"


@rule("tr.unusable", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """TR always holds a task state segment."""
    if s.segments["tr"].unusable:
        yield "tr", "TR is marked unusable", "Clear TR.unusable; type 11, present 1, limit 0x67"


@rule("tr.not-present", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """TR must be present."""
    if not s.segments["tr"].present:
        yield "tr", "TR.present=0", "Set TR.present"


@rule("tr.not-busy", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """A task state segment that is loaded is busy."""
    tr = s.segments["tr"]
    if tr.type in (1, 9):
        yield "tr", f"TR.type={tr.type} is an available TSS", f"Use {tr.type | 2}, the busy one"


@rule("tr.type", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """TR holds a TSS of the current mode."""
    tr = s.segments["tr"]
    if tr.type in (1, 9, 11) or (tr.type == 3 and not s.lma):
        return
    wanted = "11 (64-bit TSS, busy)" if s.lma else "11 (32-bit TSS, busy) or 3 (16-bit)"
    yield "tr", f"TR.type={tr.type} is no TSS for this mode", f"Use type {wanted}"


@rule("tr.code-or-data", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """A task state segment is a system segment."""
    if s.segments["tr"].s:
        yield "tr", "TR.S=1 makes it code or data", "Clear TR.s"


@rule("tr.in-ldt", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """A task state segment lives in the GDT."""
    selector = s.segments["tr"].selector
    if selector & 4:
        yield "tr", f"TR selector {selector:#x} has TI=1 (LDT)", "Use a selector with bit 2 clear"


@rule("tr.limit-too-small", "cpu", "Intel SDM Vol. 3A §7.2.2, §7.7")
def _(s: State) -> Iterator[Hit]:
    """Leaving ring 3 reads a stack pointer from the TSS."""
    limit = s.segments["tr"].limit
    if s.pe and s.cpl == 3 and limit < 0x67 and s.segments["tr"].type != 3:
        yield (
            "tr", f"TR.limit={limit:#x} is too small for a TSS: the first interrupt or exception "
            "in ring 3 raises #TS",
            "Use 0x67 or more, with a TSS at TR.base",
        )  # fmt: skip


@rule("ldtr.type", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """A usable LDTR holds an LDT."""
    segment = s.segments["ldt"]
    if s.usable("ldt") and segment.type != 2:
        yield "ldt", f"LDTR.type={segment.type} is no LDT", "Use type 2, or set LDT.unusable"


@rule("ldtr.code-or-data", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """An LDT is a system segment."""
    if s.usable("ldt") and s.segments["ldt"].s:
        yield "ldt", "LDTR.S=1 makes it code or data", "Clear LDT.s, or set LDT.unusable"


@rule("ldtr.in-ldt", "vmx", GUEST_SEGMENTS)
def _(s: State) -> Iterator[Hit]:
    """An LDT is described in the GDT."""
    selector = s.segments["ldt"].selector
    if s.usable("ldt") and selector & 4:
        yield "ldt", f"LDTR selector {selector:#x} has TI=1 (LDT)", "Use one with bit 2 clear"


@rule("descriptor-table.base-non-canonical", "vmx", GUEST_TABLES)
def _(s: State) -> Iterator[Hit]:
    """GDTR and IDTR hold canonical bases."""
    for name, (base, _limit) in s.tables.items():
        if not canonical(base, s.linear_bits):
            yield (
                name, f"{name.upper()}R.base={base:#x} is not canonical",
                f"Make bits 63:{s.linear_bits - 1} equal",
            )  # fmt: skip


@rule("descriptor-table.limit-above-64k", "vmx", GUEST_TABLES)
def _(s: State) -> Iterator[Hit]:
    """GDTR and IDTR hold limits of 16 bits."""
    for name, (_base, limit) in s.tables.items():
        if limit >> 16:
            yield name, f"{name.upper()}R.limit={limit:#x} has more than 16 bits", "Use 0xffff"
