"""A pure checker: which rules of VMX, SVM and KVM does this processor state break?

>>> for finding in check(sregs, rip=regs.rip, rflags=regs.rflags):
...     print(finding)
EFER.LME=1 and CR0.PG=1 but EFER.LMA=0 (EFER 0x100). Set EFER.LMA too (EFER 0x500). [efer.…]

It looks at registers only, asks no KVM, and changes nothing. A state without findings can still
go wrong at its first instruction: page tables, for one, are for ``walk`` to judge. A state with
findings may run: back ends enforce the rules of their vendor, some not even those.
"""

from __future__ import annotations

from . import rules_control, rules_segments, rules_tables
from .ruleset import VENDORS, Finding, Rule, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

__all__ = ["RULES", "VENDORS", "Finding", "Rule", "check"]

RULES: tuple[Rule, ...] = (*rules_control.RULES, *rules_segments.RULES, *rules_tables.RULES)
"""Every rule, control registers first."""


def check(
    sregs: Any, rip: int | None = None, rflags: int | None = None, *, phys_bits: int = 52,
    features: Iterable[str] | None = None,
) -> list[Finding]:  # fmt: skip
    """Every inconsistency in a state, in the order of ``RULES``; [] if there is none.

    Args:
        sregs: ``struct kvm_sregs`` or ``kvm_sregs2``, or anything with their fields.
        rip, rflags: from ``struct kvm_regs``; rules about them are skipped when they are None.
            Virtual-8086 mode is only recognized by RFLAGS.VM.
        phys_bits: the guest's physical-address width, ``cpuid.phys_bits()``.
        features: what the guest's CPUID offers, ``cpuid.features()``; None if unknown, which
            skips the rules that depend on it.
    """
    known = None if features is None else frozenset(features)
    state = State(sregs, rip, rflags, phys_bits, known)
    return [finding for rule in RULES for finding in rule(state)]
