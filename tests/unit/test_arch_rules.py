"""The checker: valid states break no rule, every rule fires alone on the state that breaks it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.arch.x86_64 import rules, segments
from pykvm.arch.x86_64.regs import CONTROLS, SEGMENTS, SYSTEM_SEGMENTS, DescriptorTable
from tests.support.states import BASELINES, Baseline

ALL_FEATURES = frozenset(
    {"lm", "nx", "fxsr_opt", "svm", "vmx", "umip", "la57", "fsgsbase", "pcid", "xsave", "smep"}
    | {"smap", "pku", "shstk", "x2apic"}
)


def break_state(base: str, fields: dict[str, Any]) -> Baseline:
    """The baseline with fields set: ``cs__dpl``, ``cr0``; ``r__rip`` for the general registers."""
    state = BASELINES[base]()
    for field, value in fields.items():
        owner, _, attribute = field.rpartition("__")
        target: Any = state.regs if owner == "r" else state.sregs
        if owner not in ("", "r"):
            target = getattr(state.sregs, owner)
        setattr(target, attribute, value)
    return state


def findings(state: Baseline, **options: Any) -> list[rules.Finding]:
    return rules.check(state.sregs, state.regs.rip, state.regs.rflags, **options)


def broken(state: Baseline, **options: Any) -> set[str]:
    return {finding.rule for finding in findings(state, **options)}


@pytest.mark.parametrize("base", BASELINES)
@pytest.mark.parametrize("features", [None, ALL_FEATURES])
def test_a_valid_state_breaks_no_rule(base: str, features: frozenset[str] | None) -> None:
    state = BASELINES[base]()
    assert findings(state, features=features, phys_bits=36) == []
    assert rules.check(state.sregs) == [] or base == "v8086"  # v8086 shows in RFLAGS only


LDT = {"ldt__unusable": 0, "ldt__present": 1, "ldt__limit": 7, "ldt__type": 2}

# (rule, baseline, what is changed, further rules that the change breaks too)
CASES: list[tuple[str, str, dict[str, Any], set[str]]] = [
    ("cr0.pg-without-pe", "prot32", {"cr0": 0x80000032, "cr4": 0x20}, {"real"}),
    ("cr0.nw-without-cd", "long64", {"cr0": 0xA0010033}, set()),
    ("cr0.upper-bits", "long64", {"cr0": 0x1_8001_0033}, set()),
    ("cr4.reserved-bits", "long64", {"cr4": 0x8620}, set()),
    ("cr4.reserved-bits", "long64", {"cr4": 1 << 63 | 0x620}, set()),
    ("cr4.vmxe", "long64", {"cr4": 0x2620}, set()),
    ("cr4.not-virtualized", "long64", {"cr4": 0x4620}, set()),
    ("cr4.pcide-without-long-mode", "prot32", {"cr4": 0x20600}, set()),
    ("cr4.cet-without-wp", "long64", {"cr4": 0x800620, "cr0": 0x80000033}, set()),
    ("efer.lme-without-pae", "long64", {"cr4": 0x600}, set()),
    ("efer.lme-without-lma", "long64", {"efer": 0x100}, set()),
    ("efer.lma-without-pg", "compat32", {"cr0": 0x10033}, set()),
    ("efer.lma-without-lme", "compat32", {"efer": 0x400}, set()),
    ("efer.reserved-bits", "long64", {"efer": 0x502}, set()),
    ("efer.svme", "long64", {"efer": 0x1500}, set()),
    ("cr3.beyond-physical-width", "long64", {"cr3": 1 << 52}, set()),
    ("cr3.ignored-bits", "long64", {"cr3": 0x1020}, set()),
    ("cr3.ignored-bits", "pae", {"cr3": 0x1004}, set()),
    ("cr8.above-15", "long64", {"cr8": 16}, set()),
    ("apic-base.reserved-bits", "long64", {"apic_base": 0xFEE00901}, set()),
    ("apic-base.reserved-bits", "long64", {"apic_base": 1 << 60 | 0xFEE00900}, set()),
    ("apic-base.x2apic-without-enable", "long64", {"apic_base": 0xFEE00500}, set()),
    ("rflags.bit1-clear", "long64", {"r__rflags": 0}, set()),
    ("rflags.reserved-bits", "long64", {"r__rflags": 0x8002}, set()),
    ("rflags.reserved-bits", "long64", {"r__rflags": 1 << 22 | 2}, set()),
    ("rflags.vm-in-long-mode", "long64", {"r__rflags": 0x20002}, set()),
    ("rflags.vm-in-real-mode", "real16", {"r__rflags": 0x20002}, set()),
    ("rip.upper-bits", "prot32", {"r__rip": 1 << 32}, set()),
    ("rip.upper-bits", "compat32", {"r__rip": 1 << 40}, set()),
    ("rip.non-canonical", "long64", {"r__rip": 1 << 47}, set()),
    ("rip.non-canonical", "long64", {"r__rip": 1 << 56, "cr4": 0x1620}, set()),
    ("rip.beyond-cs-limit", "prot32", {"cs__limit": 0x7FFF, "cs__g": 0}, set()),
    ("rip.beyond-cs-limit", "real16", {"r__rip": 0x10000}, set()),
    ("interrupt.if-clear", "long64", {"interrupt_bitmap": [1 << 32, 0, 0, 0]}, set()),
    ("interrupt.exception-vector", "long64",
     {"interrupt_bitmap": [1 << 14, 0, 0, 0], "r__rflags": 0x202}, set()),
    ("interrupt.several", "long64",
     {"interrupt_bitmap": [0, 1, 1, 0], "r__rflags": 0x202}, set()),
    ("cs.long-without-long-mode", "prot32", {"cs__l": 1, "cs__db": 0}, set()),
    ("cs.l-and-d", "long64", {"cs__db": 1}, set()),
    ("cs.unusable", "long64", {"cs__unusable": 1}, set()),
    ("cs.not-present", "long64", {"cs__present": 0}, set()),
    ("cs.not-code", "long64", {"cs__type": 2}, set()),
    ("cs.not-accessed", "long64", {"cs__type": 10}, set()),
    ("cs.system-segment", "long64", {"cs__s": 0}, set()),
    ("cs.data-type-in-ring", "prot32_ring3", {"cs__type": 3}, set()),
    ("cs.dpl-not-ss-dpl", "real16", {"cs__dpl": 1}, set()),
    ("cs.dpl-not-ss-dpl", "long64", {"cs__dpl": 3}, {"cs.dpl-not-rpl"}),
    ("cs.conforming-above-ss", "long64", {"cs__type": 15, "cs__dpl": 3}, set()),
    ("cs.dpl-not-rpl", "long64",
     {"cs__selector": 0x13, "ss__selector": 0x1B}, {"ss.dpl-not-rpl"}),
    ("ss.rpl-not-cs-rpl", "long64", {"cs__selector": 0x13, "cs__type": 15}, set()),
    ("ss.dpl-not-rpl", "long64", {"ss__dpl": 3, "cs__type": 15}, set()),
    ("ss.dpl-in-real-mode", "real16", {"ss__dpl": 3, "cs__dpl": 3}, set()),
    ("ss.type", "long64", {"ss__type": 1}, set()),
    ("ss.type", "long64", {"ss__type": 2}, set()),
    ("ss.unusable", "prot32", {"ss__unusable": 1}, set()),
    ("data.not-accessed", "long64", {"ds__type": 2}, set()),
    ("data.execute-only", "long64", {"gs__type": 9}, set()),
    ("data.system-segment", "long64", {"es__s": 0}, set()),
    ("data.system-segment", "long64", {"ss__s": 0}, set()),
    ("data.dpl-below-rpl", "long64", {"fs__selector": 0x1B}, set()),
    ("segment.granularity-low", "long64", {"cs__limit": 0xFFFFFFFE}, set()),
    ("segment.granularity-low", "long64", {"tr__g": 1}, set()),
    ("segment.granularity-high", "long64", {"ds__g": 0}, set()),
    ("segment.granularity-high", "real16", {"tr__limit": 1 << 20}, set()),
    ("segment.base-upper-bits", "long64", {"ds__base": 1 << 32}, set()),
    ("segment.base-upper-bits", "real16", {"cs__base": 1 << 32}, set()),
    ("segment.base-ignored", "long64", {"cs__base": 0x1000}, set()),
    ("segment.base-non-canonical", "long64", {"fs__base": 1 << 63}, set()),
    ("segment.base-non-canonical", "long64", {"tr__base": 1 << 47}, set()),
    ("segment.base-non-canonical", "long64", {**LDT, "ldt__base": 1 << 47}, set()),
    ("v8086.base", "v8086", {"ds__base": 0}, set()),
    ("v8086.limit", "v8086", {"es__limit": 0xFFFFF}, set()),
    ("v8086.access-rights", "v8086", {"gs__dpl": 0}, set()),
    ("tr.unusable", "long64", {"tr__unusable": 1}, set()),
    ("tr.not-present", "long64", {"tr__present": 0}, set()),
    ("tr.not-busy", "long64", {"tr__type": 9}, set()),
    ("tr.not-busy", "prot32", {"tr__type": 1}, set()),
    ("tr.type", "long64", {"tr__type": 3}, set()),
    ("tr.type", "prot32", {"tr__type": 2}, set()),
    ("tr.code-or-data", "long64", {"tr__s": 1}, set()),
    ("tr.in-ldt", "long64", {"tr__selector": 0x44}, set()),
    ("tr.limit-too-small", "long64_ring3", {"tr__limit": 0x66}, set()),
    ("ldtr.type", "long64", {**LDT, "ldt__type": 3}, set()),
    ("ldtr.code-or-data", "long64", {**LDT, "ldt__s": 1}, set()),
    ("ldtr.in-ldt", "long64", {**LDT, "ldt__selector": 0x4C}, set()),
    ("descriptor-table.base-non-canonical", "long64", {"gdt__base": 1 << 47}, set()),
    ("descriptor-table.base-non-canonical", "long64", {"idt__base": 1 << 63}, set()),
    ("descriptor-table.limit-above-64k", "long64", {"gdt__limit": 0x10000}, set()),
]  # fmt: skip


@pytest.mark.parametrize(
    "rule, base, fields, others", CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES]
)
def test_a_rule_fires_on_the_state_that_breaks_it_and_no_other_does(
    rule: str, base: str, fields: dict[str, Any], others: set[str]
) -> None:
    state = break_state(base, fields)
    if others == {"real"}:  # without PE the segments of prot32 are judged as real mode's
        others = broken(break_state(base, {"cr0": 0x32}))
    assert broken(state) == {rule} | others
    finding = next(finding for finding in findings(state) if finding.rule == rule)
    changed = {field.partition("__")[0] for field in fields} - {"r"}
    changed |= {field.partition("__")[2] for field in fields if field.startswith("r__")}
    assert changed.intersection(finding.registers)
    assert finding.remedy and finding.clause and set(finding.vendors) <= set(rules.VENDORS)
    assert rule in str(finding) and finding.message in str(finding)


NEEDS_CPUID: list[tuple[str, dict[str, Any], str]] = [
    ("cr4.needs-cpuid", {"cr4": 0x1620}, "la57"),
    ("cr4.needs-cpuid", {"cr4": 0x40620}, "xsave"),
    ("cr4.needs-cpuid", {"cr4": 0x100620}, "smep"),
    ("efer.needs-cpuid", {"efer": 0xD00}, "nx"),
    ("efer.svme", {"efer": 0x1500}, "svm"),
    ("cr4.vmxe", {"cr4": 0x2620}, "vmx"),
    ("apic-base.x2apic-needs-cpuid", {"apic_base": 0xFEE00D00}, "x2apic"),
]


@pytest.mark.parametrize("rule, fields, feature", NEEDS_CPUID)
def test_a_feature_is_judged_by_what_cpuid_offers(
    rule: str, fields: dict[str, Any], feature: str
) -> None:
    state = break_state("long64", fields)
    assert broken(state, features=ALL_FEATURES) == set()
    assert broken(state, features=ALL_FEATURES - {feature}) == {rule}


def test_a_lam_bit_in_cr3_is_fine_where_cpuid_offers_lam() -> None:
    state = break_state("long64", {"cr3": 1 << 61 | 0x1000})
    assert broken(state) == {"cr3.beyond-physical-width"}
    assert broken(state, features=ALL_FEATURES | {"lam"}) == set()


def test_physical_width_comes_from_cpuid() -> None:
    state = break_state("long64", {"cr3": 1 << 40})
    assert broken(state, phys_bits=41) == set()
    assert broken(state, phys_bits=40) == {"cr3.beyond-physical-width"}


def test_a_pcid_in_cr3_is_no_misalignment() -> None:
    assert broken(break_state("long64", {"cr3": 0x1FFF, "cr4": 0x20620})) == set()


def test_rules_about_rip_and_rflags_are_silent_without_them() -> None:
    state = break_state("long64", {"r__rip": 1 << 47, "r__rflags": 0})
    assert rules.check(state.sregs) == []


def test_a_null_data_segment_is_valid() -> None:
    state = BASELINES["long64"]()
    for name in ("ss", "ds", "es", "fs", "gs"):
        segments.null().apply(getattr(state.sregs, name))
    assert findings(state) == []


def test_a_segment_that_is_not_present_counts_as_unusable_as_kvm_takes_it() -> None:
    state = BASELINES["long64"]()
    segments.Segment().apply(state.sregs.ds)
    assert findings(state) == []


def test_the_reset_state_of_kvm_on_amd_is_valid() -> None:
    """It lacks the accessed bits of CS and SS (Linux arch/x86/kvm/svm/svm.c, init_vmcb)."""
    assert broken(break_state("reset", {"cs__type": 10, "ss__type": 2, "ds__type": 2})) == set()


def test_several_broken_rules_are_all_found_in_the_order_of_the_table() -> None:
    state = break_state("long64", {"efer": 0x100, "tr__type": 9, "cr8": 99})
    order = [rule.id for rule in rules.RULES]
    found = [finding.rule for finding in findings(state)]
    assert set(found) == {"efer.lme-without-lma", "tr.not-busy", "cr8.above-15"}
    assert found == sorted(found, key=order.index)


def test_every_rule_has_a_case_of_its_own() -> None:
    covered = {case[0] for case in CASES} | {case[0] for case in NEEDS_CPUID}
    assert {rule.id for rule in rules.RULES} == covered


def test_rules_are_distinct_cited_and_described() -> None:
    assert len(rules.RULES) >= 25
    assert len({rule.id for rule in rules.RULES}) == len(rules.RULES)
    for rule in rules.RULES:
        assert rule.summary.endswith(".")
        assert rule.vendors and set(rule.vendors) <= set(rules.VENDORS)
        assert any(source in rule.clause for source in ("Intel SDM", "AMD APM", "Linux"))


def test_kvm_sregs2_without_an_interrupt_bitmap_is_taken() -> None:
    state = BASELINES["long64"]()
    del state.sregs.interrupt_bitmap
    assert findings(state) == []


WORDS = st.integers(0, (1 << 64) - 1) | st.sampled_from([0, 1, 1 << 31, 1 << 63, 0x80010033])
FIELDS: Iterable[str] = (
    *(f"{name}__{field}" for name in (*SEGMENTS, *SYSTEM_SEGMENTS) for field in segments.FIELDS),
    *(f"{name}__{field}" for name in ("gdt", "idt") for field in DescriptorTable.__slots__),
    *CONTROLS, "r__rip", "r__rflags",
)  # fmt: skip


@given(
    st.sampled_from(sorted(BASELINES)),
    st.dictionaries(st.sampled_from(sorted(FIELDS)), WORDS, max_size=12),
    st.lists(WORDS, min_size=4, max_size=4),
    st.none() | st.sets(st.sampled_from(sorted(ALL_FEATURES))),
)
def test_no_value_of_any_field_makes_the_checker_raise(
    base: str, fields: dict[str, int], bitmap: list[int], features: set[str] | None
) -> None:
    state = break_state(base, {**fields, "interrupt_bitmap": bitmap})
    for finding in findings(state, features=features):
        assert finding.message and str(finding)
