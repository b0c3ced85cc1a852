"""Explanations: the telling sentence is there, whatever else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.arch.x86_64 import explain
from pykvm.arch.x86_64.regs import CONTROLS, SEGMENTS, SYSTEM_SEGMENTS
from pykvm.arch.x86_64.rules_control import BY_CPUID
from pykvm.arch.x86_64.segments import FIELDS
from pykvm.arch.x86_64.tables import Idt
from tests.support.states import BASELINES, Baseline, long64, long64_ring3, prot32, real16, reset


def with_code(state: Baseline, code: bytes) -> Baseline:
    state.memory[0x8000 : 0x8000 + len(code)] = code
    return state


def with_idt(state: Baseline, *vectors: int) -> Baseline:
    idt = Idt(base=0x10000, long=bool(state.sregs.efer))
    for vector in vectors:
        idt.set(vector, 0x9000)
    idt.write(state.memory)
    idt.load(state.sregs.idt)
    return state


def context(state: Baseline) -> dict[str, Any]:
    return {"sregs": state.sregs, "regs": state.regs, "memory": state.memory}


# -- KVM_SET_SREGS --------------------------------------------------------------------------------


def test_a_refusal_names_the_rule_that_kvm_enforces_first() -> None:
    state = long64()
    state.sregs.cr8, state.sregs.efer = 99, 0x100
    found = explain.explain_refused(state.sregs, regs=state.regs, memory=state.memory)
    assert [finding.rule for finding in found.findings] == ["efer.lme-without-lma", "cr8.above-15"]
    assert "KVM_SET_SREGS refused the registers (EINVAL)" in str(found)
    assert "EFER.LME=1 and CR0.PG=1 but EFER.LMA=0" in found.cause
    assert "enforced by KVM_SET_SREGS (EINVAL), VM entry on Intel" in str(found)


def test_a_refusal_without_a_broken_rule_points_to_cpuid() -> None:
    found = explain.explain_refused(long64().sregs, ioctl="KVM_SET_SREGS2")
    assert found.what.startswith("KVM_SET_SREGS2")
    assert "set CPUID before the registers" in found.cause
    assert found.walk is None and "code at CS:RIP" not in str(found)


# -- KVM_EXIT_FAIL_ENTRY --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reason, words",
    [
        (0x80000021, "invalid guest state (VMX basic exit reason 33)"),
        (0x80000022, "MSR loading"),
        (0x80000029, "machine check"),
        (0x800000FF, "VMX basic exit reason 255"),
        ((1 << 64) - 1, "VMEXIT_INVALID"),
        (0xFFFFFFFF, "VMEXIT_INVALID"),
        (-1, "VMEXIT_INVALID"),
        (7, "hardware reason 0x7"),
    ],
)
def test_a_failed_entry_is_named_by_its_hardware_reason(reason: int, words: str) -> None:
    assert words in explain.explain_fail_entry(reason, **context(long64())).what


def test_a_failed_entry_lists_what_is_broken_or_where_else_to_look() -> None:
    state = long64()
    state.sregs.cs.db = 1
    found = explain.explain_fail_entry(0x80000021, **context(state))
    assert [finding.rule for finding in found.findings] == ["cs.l-and-d"]
    assert "VMRUN on AMD" in str(found)
    assert "debug registers" in explain.explain_fail_entry(0, **context(long64())).cause


# -- KVM_EXIT_INTERNAL_ERROR ----------------------------------------------------------------------

EMULATION = "KVM_INTERNAL_ERROR_EMULATION"


def test_an_emulation_failure_names_the_instruction_the_mode_and_the_remedy() -> None:
    state = with_code(long64(), bytes.fromhex("0f28c1"))
    found = explain.explain_internal_error(EMULATION, **context(state))
    assert found.instruction == "SSE or MMX" and found.code[:3] == bytes.fromhex("0f28c1")
    assert found.cause == (
        "this KVM cannot emulate this instruction in this mode: SSE or MMX in 64-bit, ring 0"
    )
    assert "ring 3" in str(found) and "0f 28 c1" in str(found)


def test_the_bytes_that_kvm_reports_count_before_those_in_memory() -> None:
    found = explain.explain_internal_error(
        EMULATION, insn=b"\xd9\xe8", data=(1, 2), **context(with_code(long64(), b"\xcc"))
    )
    assert found.instruction == "x87 floating point" and found.code == b"\xd9\xe8"


def test_a_rip_outside_ram_comes_before_all_else() -> None:
    state = long64()
    state.regs.rip = 0x1000_0000
    found = explain.explain_internal_error(EMULATION, **context(state))
    assert "gpa 0x10000000, which is not RAM" in found.cause
    assert "not readable" in str(found)
    assert len(found.hints) == 1  # no instruction is to blame where there is none


def test_a_vcpu_that_was_never_entered_is_told_so() -> None:
    state = real16()
    state.regs.rip, state.sregs.cs.selector, state.sregs.cs.base = 0xFFF0, 0xF000, 0xFFFF0000
    found = explain.explain_internal_error(EMULATION, **context(state))
    assert "gpa 0xfffffff0, which is not RAM" in found.cause
    assert "cpu.enter(mode, entry=gpa) was not called" in found.hints[1]


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (long64, "0f32", "RDMSR of MSR 0x12345 (ECX) raises #GP if KVM or the vCPU's CPUID does"),
        (long64, "0f30", "WRMSR of MSR 0x12345 (ECX) raises #GP if KVM or the vCPU's CPUID does"),
        (long64_ring3, "0f32", "RDMSR raises #GP in ring 3"),
    ],
)
def test_an_msr_that_is_not_there_is_named(make: Callable[[], Any], code: str, words: str) -> None:
    state = with_code(make(), bytes.fromhex(code))
    state.regs.rcx = 0xFFFFFFFF_00012345
    found = explain.explain_shutdown(**context(state))
    assert found.cause.startswith(words)
    assert ("does not take this value" in found.cause) == (code == "0f30")


def test_zeros_at_rip_are_noticed() -> None:
    found = explain.explain_internal_error(EMULATION, **context(long64()))
    assert "all zeros" in found.cause


@pytest.mark.parametrize(
    "suberror, words",
    [
        ("KVM_INTERNAL_ERROR_SIMUL_EX", "two exceptions at once"),
        ("KVM_INTERNAL_ERROR_DELIVERY_EV", "delivering an event"),
        ("KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON", "cannot handle"),
        ("suberror 77", "not known here (suberror 77)"),
    ],
)
def test_other_suberrors_show_their_data(suberror: str, words: str) -> None:
    state = with_code(long64(), b"\x90")
    found = explain.explain_internal_error(suberror, data=(0x31, 5), **context(state))
    assert words in found.what
    assert found.hints[-1] == "data: 0x31 0x5"


# -- KVM_EXIT_SHUTDOWN ----------------------------------------------------------------------------


def test_a_shutdown_without_an_idt_says_so() -> None:
    found = explain.explain_shutdown(**context(with_code(long64(), b"\x0f\x0b")))
    assert "UD2" in found.cause
    assert "there is no IDT (IDTR.limit 0x0)" in str(found)
    assert found.stack_walk is not None and found.stack_walk.gpa == 0x7FF8


def test_a_shutdown_names_the_vectors_without_a_handler() -> None:
    state = with_idt(with_code(long64(), b"\x90"), 6, 13)
    found = explain.explain_shutdown(**context(state))
    assert "the IDT at 0x10000 has no handler for #DF, #PF" in str(found)
    complete = explain.explain_shutdown(
        **context(with_idt(with_code(long64(), b"\x90"), 6, 8, 13, 14))
    )
    assert "handler" not in str(complete)


def test_a_32_bit_idt_is_read_with_its_own_gate_size() -> None:
    state = with_idt(with_code(prot32(), b"\x90"), 6, 8, 13, 14)
    assert explain.explain_shutdown(**context(state)).hints == []


def test_an_idt_that_cannot_be_read_is_the_cause() -> None:
    state = with_code(long64(), b"\x90")
    state.sregs.idt.base, state.sregs.idt.limit = 0x40_0000_0000, 0xFFF
    text = str(explain.explain_shutdown(**context(state)))
    assert "the IDT at 0x4000000000 cannot be read: #PF" in text
    state.sregs.idt.base = 0x8000_0000
    assert "gpa 0x80000000 is not RAM" in str(explain.explain_shutdown(**context(state)))


def test_a_short_real_mode_vector_table_is_noticed() -> None:
    state = with_code(real16(), b"\x90")
    assert explain.explain_shutdown(**context(state)).hints == []
    state.sregs.idt.limit = 0
    assert "IVT" in explain.explain_shutdown(**context(state)).cause


def test_a_stack_that_is_not_mapped_is_noticed() -> None:
    state = with_code(long64(), b"\x50")
    state.regs.rsp = 0
    found = explain.explain_shutdown(**context(state))
    assert "the stack cannot be written" in str(found)
    assert found.stack_walk is not None and found.stack_walk.gva == (1 << 64) - 8
    state.regs.rsp = 0x2000_0000
    assert "gpa 0x1ffffff8 is not RAM" in str(explain.explain_shutdown(**context(state)))


@pytest.mark.parametrize(
    "make, code, words",
    [
        (long64_ring3, "f4", "HLT raises #GP in ring 3"),
        (long64_ring3, "fa", "CLI raises #GP in ring 3 unless IOPL is 3"),
        (long64_ring3, "e6e9", "iopl=3"),
        (long64_ring3, "ee", "IN and OUT raise #GP"),
        (long64, "0f05", "EFER.SCE=0"),
        (long64, "cc", "INT3"),
        (prot32, "c5f877", "CR4.OSXSAVE=0 AVX raises #UD"),
    ],
)
def test_an_instruction_that_faults_by_itself_is_the_first_guess(
    make: Any, code: str, words: str
) -> None:
    state = with_code(make(), bytes.fromhex(code))
    assert words in explain.explain_shutdown(**context(state)).cause


def test_ring_0_may_halt() -> None:
    assert "HLT" not in str(explain.explain_shutdown(**context(with_code(long64(), b"\xf4"))))


def test_sse_without_osfxsr() -> None:
    state = with_code(long64(), bytes.fromhex("0f28c1"))
    state.sregs.cr4 = 0x20
    assert "CR4.OSFXSR=0" in explain.explain_shutdown(**context(state)).cause


def test_the_last_page_fault_is_told() -> None:
    state = with_code(long64(), b"\x90")
    state.sregs.cr2 = 0xDEAD0000
    assert "0xdead0000 (CR2)" in str(explain.explain_shutdown(**context(state)))


def test_paging_that_got_lost_is_noticed() -> None:
    """kvm-pvm clears CR0.PG outside long mode."""
    state = with_code(prot32(), b"\x90")
    state.sregs.cr3 = 0x10000
    assert "CR0.PG=0" in explain.explain_shutdown(**context(state)).cause


def test_a_1_gib_page_that_cpuid_does_not_offer_is_told() -> None:
    state = long64()
    state.memory[0x2000:0x2008] = (0x83).to_bytes(8, "little")
    text = str(explain.explain_shutdown(**context(state), features={"lm"}))
    assert "RIP cannot be fetched: #PF" in text and "CPUID does not offer" in text


def test_registers_that_a_shutdown_reset_are_recognized() -> None:
    found = explain.explain_shutdown(**context(reset()))
    assert "after reset" in found.cause and found.stack_walk is None


def test_what_is_known_otherwise_is_told_only_where_the_registers_are_lost() -> None:
    lost = explain.explain_shutdown(**context(reset()), known=["the last port was 0x3f8"])
    assert lost.hints[1:] == ["the last port was 0x3f8"]
    kept = explain.explain_shutdown(**context(long64()), known=["the last port was 0x3f8"])
    assert "0x3f8" not in str(kept)


def test_without_memory_the_registers_still_speak() -> None:
    state = long64()
    found = explain.explain_shutdown(sregs=state.sregs, regs=state.regs)
    assert found.walk is None and "there is no IDT" in found.cause


# -- as a whole -----------------------------------------------------------------------------------


def test_an_explanation_reads_from_the_cause_to_the_details() -> None:
    state = with_code(long64(), b"\x0f\x0b")
    text = str(explain.explain_shutdown(**context(state)))
    order = ["triple-faulted", "UD2", "RAX=", "CS  0x0010", "code at CS:RIP: 0f 0b", "walk of RIP",
             "walk of the stack"]  # fmt: skip
    places = [text.index(part) for part in order]
    assert places == sorted(places)


WORDS = st.integers(0, (1 << 64) - 1) | st.sampled_from([0, 0x8000, 1 << 31, 1 << 63, 0x500])
FIELD_NAMES = sorted(
    {f"{name}__{field}" for name in (*SEGMENTS, *SYSTEM_SEGMENTS) for field in FIELDS}
    | {f"{name}__{field}" for name in ("gdt", "idt") for field in ("base", "limit")}
    | {*CONTROLS, "r__rip", "r__rsp", "r__rflags"}
)


@given(
    st.sampled_from(sorted(BASELINES)),
    st.dictionaries(st.sampled_from(FIELD_NAMES), WORDS, max_size=8),
    st.binary(max_size=16),
    WORDS,
)
def test_no_state_and_no_code_makes_an_explanation_raise(
    base: str, fields: dict[str, int], code: bytes, reason: int
) -> None:
    state = with_code(BASELINES[base](), code)
    for field, value in fields.items():
        owner, _, attribute = field.rpartition("__")
        target: Any = state.regs if owner == "r" else state.sregs
        setattr(target if owner in ("", "r") else getattr(target, owner), attribute, value)
    for found in (
        explain.explain_refused(state.sregs, regs=state.regs, memory=state.memory),
        explain.explain_fail_entry(reason, **context(state)),
        explain.explain_internal_error(EMULATION, data=(reason,), **context(state)),
        explain.explain_shutdown(**context(state)),
    ):
        assert found.what in str(found) and found.cause and repr(found)


# -- what only KVM could have refused --------------------------------------------------------------


@pytest.mark.parametrize("how", ["internal-error", "shutdown"])
def test_a_bit_that_cpuid_lacks_is_no_broken_rule_of_a_guest_that_ran_with_it(how: str) -> None:
    state = with_code(long64(), b"\xcc")
    state.sregs.cr4 |= 1 << 16  # FSGSBASE, by the guest's own MOV to CR4
    known = {**context(state), "features": {"lm", "nx"}}
    if how == "shutdown":
        found = explain.explain_shutdown(**known)
    else:
        found = explain.explain_internal_error("KVM_INTERNAL_ERROR_EMULATION", **known)
    assert found.findings == []
    assert [finding.rule for finding in found.passed] == ["cr4.needs-cpuid"]
    assert "break these rules" not in str(found) and "inconsistent" not in str(found)
    assert "lets pass, so it is hardly the cause: CR4.FSGSBASE=1" in str(found)


def test_a_bit_that_cpuid_lacks_is_why_kvm_refuses() -> None:
    state = long64()
    state.sregs.cr4 |= 1 << 16
    found = explain.explain_refused(state.sregs, features={"lm", "nx"})
    assert [finding.rule for finding in found.findings] == ["cr4.needs-cpuid"]
    assert found.passed == []


def test_the_rules_about_cpuid_are_rules() -> None:
    from pykvm.arch.x86_64 import rules

    assert {rule.id for rule in rules.RULES if rule.vendors == ("kvm",)} >= BY_CPUID
