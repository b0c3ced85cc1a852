"""What a consistency rule is: the shared ground of the ``rules_*``."""

from __future__ import annotations

from .regs import DESCRIPTOR_TABLES, SEGMENTS, SYSTEM_SEGMENTS
from .segments import Segment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Hit = tuple[str, str, str]  # registers concerned, message, remedy
    Body = Callable[["State"], Iterator[Hit]]

VENDORS = {
    "kvm": "KVM_SET_SREGS (EINVAL)",
    "vmx": "VM entry on Intel (KVM_EXIT_FAIL_ENTRY)",
    "svm": "VMRUN on AMD (KVM_EXIT_FAIL_ENTRY)",
    "cpu": "the processor, which ignores the value or faults at first use",
}
"""Who enforces a rule, and how that shows. No back end enforces every rule of its vendor."""


class Finding:
    """One inconsistency in a state.

    Attributes:
        rule: short, stable name, ``efer.lme-without-lma``.
        registers: the registers concerned, ``("efer", "cr0")``.
        message: what is wrong, naming registers and values.
        remedy: what to change.
        clause: where the rule is written: Intel SDM, AMD APM, or the Linux source.
        vendors: who enforces it, keys of ``VENDORS``.
    """

    __slots__ = ("clause", "message", "registers", "remedy", "rule", "vendors")

    def __init__(
        self, rule: str, registers: tuple[str, ...], message: str, remedy: str, clause: str,
        vendors: tuple[str, ...],
    ) -> None:  # fmt: skip
        self.rule, self.registers, self.message = rule, registers, message
        self.remedy, self.clause, self.vendors = remedy, clause, vendors

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy}. [{self.rule}; {self.clause}]"

    def __repr__(self) -> str:
        return f"<Finding {self.rule}: {self.message}>"


class Rule:
    """A rule: its name, who enforces it, where it is written, and the test itself."""

    __slots__ = ("body", "clause", "id", "summary", "vendors")

    def __init__(self, id: str, vendors: tuple[str, ...], clause: str, body: Body) -> None:
        self.id, self.vendors, self.clause, self.body = id, vendors, clause, body
        self.summary = (body.__doc__ or "").strip()

    def __call__(self, state: State) -> Iterator[Finding]:
        """The findings of this rule alone."""
        for registers, message, remedy in self.body(state):
            yield Finding(
                self.id, tuple(registers.split()), message, remedy, self.clause, self.vendors
            )

    def __repr__(self) -> str:
        return f"<Rule {self.id}: {self.summary}>"


def registrar(rules: list[Rule]) -> Callable[[str, str, str], Callable[[Body], Body]]:
    """A decorator ``@rule(id, vendors, clause)`` that appends to ``rules``."""

    def rule(id: str, vendors: str, clause: str) -> Callable[[Body], Body]:
        def register(body: Body) -> Body:
            rules.append(Rule(id, tuple(vendors.split()), clause, body))
            return body

        return register

    return rule


class State:
    """A processor state taken apart, so that a rule reads like the sentence in the manual.

    Attributes:
        cr0 … apic_base, rip, rflags: plain integers; rip and rflags None when not known.
        pe, pg, lme, lma: those bits. In the manual's words, ``lma`` is "IA-32e mode guest".
        code64: 64-bit code is running. real, v86: real mode, virtual-8086 mode.
        descriptors: segment registers are loaded from descriptors: neither real mode nor
            virtual-8086 mode. In real mode accessed bits and RPLs mean nothing, and KVM on AMD
            leaves the former clear in its own reset state.
        segments: name → ``Segment``, for all eight; gdt, idt: (base, limit).
        linear_bits: 57 with CR4.LA57, else 48.
        phys_bits: width of physical addresses. features: CPUID features, or None if unknown.
    """

    __slots__ = (
        "apic_base", "code64", "cr0", "cr3", "cr4", "cr8", "descriptors", "efer", "features",
        "linear_bits",
        "lma", "lme", "pe", "pending", "pg", "phys_bits", "real", "rflags", "rip", "segments",
        "tables", "v86",
    )  # fmt: skip

    def __init__(
        self, sregs: Any, rip: int | None, rflags: int | None, phys_bits: int,
        features: frozenset[str] | None,
    ) -> None:  # fmt: skip
        from .regs import pending_vectors

        self.cr0, self.cr3, self.cr4 = int(sregs.cr0), int(sregs.cr3), int(sregs.cr4)
        self.cr8, self.efer, self.apic_base = int(sregs.cr8), int(sregs.efer), int(sregs.apic_base)
        self.rip = None if rip is None else int(rip)
        self.rflags = None if rflags is None else int(rflags)
        self.phys_bits, self.features = phys_bits, features
        self.segments = {
            name: Segment.of(getattr(sregs, name)) for name in (*SEGMENTS, *SYSTEM_SEGMENTS)
        }
        self.tables = {
            name: (int(getattr(sregs, name).base), int(getattr(sregs, name).limit))
            for name in DESCRIPTOR_TABLES
        }
        self.pending = pending_vectors(sregs)
        self.pe, self.pg = bool(self.cr0 & 1), bool(self.cr0 >> 31 & 1)
        self.lme, self.lma = bool(self.efer >> 8 & 1), bool(self.efer >> 10 & 1)
        self.code64 = self.lma and bool(self.segments["cs"].l)
        self.real = not self.pe
        self.v86 = self.pe and not self.lma and bool((self.rflags or 0) >> 17 & 1)
        self.descriptors = self.pe and not self.v86
        self.linear_bits = 57 if self.cr4 >> 12 & 1 else 48

    @property
    def cpl(self) -> int:
        """Current privilege level: SS.DPL."""
        return self.segments["ss"].dpl & 3

    def usable(self, name: str) -> bool:
        """Whether a segment register holds a segment. KVM takes "not present" as unusable."""
        segment = self.segments[name]
        return bool(segment.present) and not segment.unusable

    def loaded(self, *names: str) -> Iterator[tuple[str, Segment]]:
        """(NAME, segment) of the usable ones among ``names``; CS always counts as usable."""
        for name in names:
            if name == "cs" or self.usable(name):
                yield name, self.segments[name]
