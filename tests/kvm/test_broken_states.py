"""Broken processor states, tried on the live back end: what it refuses, the checker explains.

Every state is valid but for one mutation. A back end may refuse it (SET_SREGS with EINVAL,
FAIL_ENTRY, INTERNAL_ERROR, SHUTDOWN) or run it without a word; none enforces all rules. What must
never happen is a refusal that the checker has no word for.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import signal
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from pykvm._abi import ffi
from pykvm.arch.x86_64 import cpuid, explain, modes, rules, segments
from pykvm.arch.x86_64.paging import PageTables
from pykvm.arch.x86_64.regs import CR4_BITS
from pykvm.arch.x86_64.rules_control import CR4_FEATURES
from pykvm.errors import KvmError
from pykvm.kvm import Kvm, exits
from tests.support.backend import describe_backend

RAM = 2 << 20
ENTRY = 0x8000
# A store to an address that is no RAM: an exit that needs no privilege, in any ring.
STORE = {
    "real16": bytes.fromhex("e6e9"),  # out 0xe9, al: 16-bit addresses are all RAM here
    "prot32": bytes.fromhex("a2000000d0"),  # mov [0xd0000000], al
    "long64": bytes.fromhex("a2000000d000000000"),
}
RAN = (exits.IoExit, exits.MmioExit, exits.HltExit)

Mutation = Callable[[Any, Any], None]


def field_size(struct: Any, field: str) -> int:
    """Width in bytes of an integer field of a cffi structure."""
    kind = ffi.typeof(struct)
    fields = dict((kind.item if kind.kind == "pointer" else kind).fields)
    return int(ffi.sizeof(fields[field].type))


def state(rule: str, base: str = "long64", ring: int = 0, *, name: str = "", **fields: Any) -> Any:
    """One broken state: the rule it breaks, and fields as ``cs__dpl=3`` or ``r__rip=…``."""

    def mutate(sregs: Any, regs: Any) -> None:
        for field, value in fields.items():
            owner, _, attribute = field.rpartition("__")
            target = regs if owner == "r" else getattr(sregs, owner) if owner else sregs
            setattr(target, attribute, value)

    return pytest.param(rule, base, ring, mutate, id=name or rule)


LDT: dict[str, Any] = {"ldt__unusable": 0, "ldt__present": 1, "ldt__limit": 7}

STATES = [
    state("cr0.pg-without-pe", cr0=0x80010032),
    state("cr0.nw-without-cd", cr0=0xA0010033),
    state("cr0.upper-bits", cr0=0x180010033),
    state("cr4.reserved-bits", cr4=0x8620),
    state("cr4.vmxe", cr4=0x2620),
    state("cr4.not-virtualized", cr4=0x4620),
    state("cr4.pcide-without-long-mode", "prot32", cr4=0x20600),
    state("cr4.cet-without-wp", cr4=0x800620, cr0=0x80000033),
    state("efer.lme-without-pae", cr4=0x600),
    state("efer.lme-without-lma", efer=0x100),
    state("efer.lma-without-pg", cr0=0x10033),
    state("efer.lma-without-lme", efer=0x400),
    state("efer.reserved-bits", efer=0x502),
    state("efer.svme", efer=0x1500),
    state("cr3.beyond-physical-width", cr3=1 << 52),
    state("cr3.ignored-bits", cr3=0x1020),
    state("cr8.above-15", cr8=16),
    state("apic-base.reserved-bits", apic_base=0xFEE00901),
    state("apic-base.x2apic-without-enable", apic_base=0xFEE00500),
    state("rflags.bit1-clear", r__rflags=0),
    state("rflags.reserved-bits", r__rflags=0x8002),
    state("rflags.vm-in-long-mode", r__rflags=0x20002),
    state("rflags.vm-in-real-mode", "real16", r__rflags=0x20002),
    state("rip.upper-bits", "prot32", r__rip=0x1_0000_8000),
    state("rip.non-canonical", r__rip=1 << 47),
    state("rip.beyond-cs-limit", "prot32", cs__limit=0xFFF, cs__g=0),
    state("interrupt.if-clear", interrupt_bitmap=[1 << 32, 0, 0, 0]),
    state("cs.long-without-long-mode", "prot32", cs__l=1, cs__db=0),
    state("cs.l-and-d", cs__db=1),
    state("cs.unusable", cs__unusable=1),
    state("cs.not-present", cs__present=0),
    state("cs.not-code", cs__type=2),
    state("cs.not-accessed", cs__type=10),
    state("cs.system-segment", cs__s=0),
    state("cs.dpl-not-ss-dpl", cs__dpl=3),
    state("cs.dpl-not-rpl", cs__selector=0x13, ss__selector=0x1B),
    state("cs.conforming-above-ss", cs__type=15, cs__dpl=3),
    state("cs.data-type-in-ring", "prot32", 3, cs__type=3),
    state("ss.rpl-not-cs-rpl", ss__selector=0x1B, ss__dpl=3),
    state("ss.dpl-not-rpl", "prot32", ss__dpl=3),
    state("ss.dpl-in-real-mode", "real16", ss__dpl=3),
    state("ss.type", ss__type=1),
    state("ss.unusable", "prot32", ss__unusable=1),
    state("data.not-accessed", ds__type=2),
    state("data.execute-only", ds__type=9),
    state("data.system-segment", ds__s=0),
    state("data.dpl-below-rpl", ds__selector=0x1B),
    state("segment.granularity-low", cs__limit=0xFFFFFFFE),
    state("segment.granularity-high", cs__g=0),
    state("segment.base-upper-bits", ds__base=1 << 32),
    state("segment.base-ignored", cs__base=0x1000),
    state("segment.base-non-canonical", fs__base=1 << 63),
    state("v8086.base", "prot32", r__rflags=0x20002, cs__base=0x10),
    state("tr.unusable", tr__unusable=1),
    state("tr.not-present", tr__present=0),
    state("tr.not-busy", tr__type=9),
    state("tr.type", tr__type=2),
    state("tr.code-or-data", tr__s=1),
    state("tr.in-ldt", tr__selector=0x44),
    state("tr.limit-too-small", "long64", 3, tr__limit=0),
    state("ldtr.type", ldt__type=3, **LDT),
    state("ldtr.in-ldt", ldt__type=2, ldt__selector=0x4C, **LDT),
    state("ldtr.code-or-data", ldt__type=2, ldt__s=1, **LDT),
    state("descriptor-table.base-non-canonical", gdt__base=1 << 60, name="gdt-base"),
    state("descriptor-table.base-non-canonical", idt__base=1 << 60, name="idt-base"),
]
assert len(STATES) >= 30

_tally: dict[str, list[str]] = {}


def without_nesting(entries: list[Any]) -> list[Any]:
    """CPUID entries without VMX and SVM, whose control bits are then no guest's to set."""
    for entry in entries:
        if entry.function == 1:
            entry.ecx &= ~(1 << 5)
        elif entry.function == 0x80000001:
            entry.ecx &= ~(1 << 2)
    return entries


class Guest:
    """A vCPU with 2 MiB of RAM and all of the CPUID that KVM supports, but for nesting."""

    def __init__(self, kvm: Kvm) -> None:
        self.cpuid = without_nesting(kvm.get_supported_cpuid())
        self.vm = kvm.create_vm()
        self.memory = mmap.mmap(-1, RAM)
        address = int(ffi.cast("uintptr_t", ffi.from_buffer(self.memory)))
        self.vm.set_user_memory_region(0, 0, RAM, address, 0)
        self.vcpu = self.vm.create_vcpu(0)
        self.vcpu.set_cpuid2(self.cpuid)
        self.sregs, self.regs = self.vcpu.get_sregs(), self.vcpu.get_regs()

    def enter(self, mode: str, ring: int = 0) -> None:
        modes.enter(
            mode, sregs=self.sregs, regs=self.regs, memory=self.memory, entry=ENTRY, ring=ring
        )
        self.memory[ENTRY : ENTRY + 16] = STORE[mode].ljust(16, b"\xf4")

    def check(self) -> list[rules.Finding]:
        return rules.check(
            self.sregs, self.regs.rip, self.regs.rflags,
            phys_bits=cpuid.phys_bits(self.cpuid), features=cpuid.features(self.cpuid),
        )  # fmt: skip

    def try_it(self, seconds: float = 0.5) -> tuple[str, explain.Explanation | None]:
        """("ran", None), or the name of the refusal and its explanation.

        A state that loops is stopped by a signal after ``seconds``.
        """
        with alarm(seconds):
            return self._try_it()

    def _try_it(self) -> tuple[str, explain.Explanation | None]:
        context: dict[str, Any] = {
            "memory": self.memory,
            "phys_bits": cpuid.phys_bits(self.cpuid),
            "features": cpuid.features(self.cpuid),
        }
        try:
            self.vcpu.set_sregs(self.sregs)
            self.vcpu.set_regs(self.regs)
        except KvmError as error:
            assert error.errno == errno.EINVAL
            found = explain.explain_refused(
                self.sregs, regs=self.regs, ioctl=error.ioctl, **context
            )
            return error.ioctl, found
        try:
            self.vcpu.run()
        except KvmError as error:
            assert error.errno == errno.EINVAL
            return error.ioctl, explain.explain_refused(
                self.sregs, regs=self.regs, ioctl=error.ioctl, **context
            )
        # Explained is the state that was set: the one after the exit is the back end's to change.
        context |= {"sregs": self.sregs, "regs": self.regs}
        exit = exits.decode(self.vcpu.kvm_run)
        if isinstance(exit, exits.FailEntryExit):
            reason = exit.hardware_entry_failure_reason
            return "FAIL_ENTRY", explain.explain_fail_entry(reason, **context)
        if isinstance(exit, exits.InternalErrorExit):
            return "INTERNAL_ERROR", explain.explain_internal_error(
                f"suberror {exit.suberror}", data=exit.data, **context
            )
        if isinstance(exit, exits.ShutdownExit):
            return "SHUTDOWN", explain.explain_shutdown(**context)
        if isinstance(exit, exits.IntrExit):
            return "looped", None
        assert isinstance(exit, RAN), exit
        return "ran", None

    def close(self) -> None:
        self.vcpu.close()
        self.vm.close()


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Signals from ``seconds`` on, which make KVM_RUN return."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def guest(kvm: Kvm) -> Iterator[Guest]:
    made = Guest(kvm)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("mode, ring", [("real16", 0), ("prot32", 0), ("long64", 0), ("long64", 3)])
def test_a_state_from_enter_breaks_no_rule_and_runs(guest: Guest, mode: str, ring: int) -> None:
    guest.enter(mode, ring)
    assert guest.check() == []
    assert guest.try_it() == ("ran", None)


def test_the_reset_state_breaks_no_rule(guest: Guest) -> None:
    assert guest.check() == []


@pytest.mark.parametrize("rule, base, ring, mutate", STATES)
def test_what_the_back_end_refuses_the_checker_explains(
    guest: Guest, request: pytest.FixtureRequest, rule: str, base: str, ring: int, mutate: Mutation
) -> None:
    guest.enter(base, ring)
    mutate(guest.sregs, guest.regs)
    found = [finding.rule for finding in guest.check()]
    assert rule in found
    outcome, explanation = guest.try_it()
    _tally.setdefault(outcome, []).append(request.node.callspec.id)
    if explanation is not None:
        assert rule in [finding.rule for finding in explanation.findings]
        assert rule in str(explanation)
        assert explanation.registers
        assert_accounted_for(outcome, explanation)


def assert_accounted_for(outcome: str, explanation: explain.Explanation) -> None:
    """A refusal by KVM has a rule of KVM's, one by hardware a rule of hardware's."""
    vendors = {vendor for finding in explanation.findings for vendor in finding.vendors}
    if outcome == "KVM_SET_SREGS":
        assert "kvm" in vendors, explanation
    elif outcome == "FAIL_ENTRY":
        assert vendors & {"vmx", "svm"}, explanation


# Values that sit on the edges of rules: for any field, whatever its width.
EDGES = (0, 1, 2, 3, 8, 11, 0x10, 0x33, 0xFFF, 0x1000, 0xFFFF, 0x80000011, (1 << 32) - 1, 1 << 32)
FIELDS = [
    *(f"{segment}__{field}" for segment in ("cs", "ss", "ds", "tr", "ldt")
      for field in segments.FIELDS),
    "cr0", "cr3", "cr4", "cr8", "efer", "apic_base", "r__rflags", "r__rip",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_states_broken_at_random_are_never_refused_without_a_rule(kvm: Kvm, seed: int) -> None:
    """What KVM or the processor says no to must be known, also where nobody thought of it."""
    random = Random(seed)
    for _ in range(12):
        guest = Guest(kvm)
        try:
            guest.enter(random.choice(("real16", "prot32", "long64")))
            for field in random.sample(FIELDS, 2):
                owner, _, attribute = field.rpartition("__")
                registers = guest.regs if owner == "r" else guest.sregs
                target = getattr(registers, owner) if owner not in ("", "r") else registers
                old = getattr(target, attribute)
                value = random.choice((*EDGES, old ^ 1 << random.randrange(64)))
                setattr(target, attribute, value & (1 << 8 * field_size(target, attribute)) - 1)
            outcome, explanation = guest.try_it(seconds=0.2)
            if explanation is not None:
                assert_accounted_for(outcome, explanation)
        finally:
            guest.close()


def test_a_state_that_cpuid_forbids_is_explained(guest: Guest) -> None:
    """CR4.LA57, PKE and the like depend on CPUID, which is why the checker asks for it."""
    guest.enter("long64")
    have = cpuid.features(guest.cpuid)
    missing = [name for name, wanted in CR4_FEATURES.items() if not have.intersection(wanted)]
    if not missing:
        pytest.skip("KVM_GET_SUPPORTED_CPUID offers every feature of CR4 known here")
    for name in missing:
        guest.sregs.cr4 = 0x620 | 1 << CR4_BITS[name]
        assert "cr4.needs-cpuid" in [finding.rule for finding in guest.check()]
        outcome, explanation = guest.try_it()
        if explanation is not None:
            assert f"CR4.{name}" in str(explanation), outcome


@pytest.mark.parametrize("paging", ["32-bit", "pae"])
def test_paging_outside_long_mode_runs_or_its_loss_is_explained(guest: Guest, paging: str) -> None:
    """kvm-pvm drops CR0.PG there without a word, and shuts down at the first instruction."""
    guest.enter("prot32")
    tables = PageTables(guest.memory, 0x10000, mode=paging)
    tables.identity(0x400000)
    tables.identity(0x1000, start=0xD0000000)
    guest.sregs.cr3, guest.sregs.cr0 = tables.cr3, 0x80010033
    guest.sregs.cr4 |= 0x20 if paging == "pae" else 0x10
    assert guest.check() == []
    outcome, _ = guest.try_it()
    if outcome != "ran":
        found = explain.explain_shutdown(
            sregs=guest.vcpu.get_sregs(), regs=guest.vcpu.get_regs(), memory=guest.memory
        )
        assert outcome == "SHUTDOWN" and "CR0.PG" in found.cause


def test_a_v8086_state_breaks_no_rule(guest: Guest) -> None:
    guest.enter("prot32")
    for name in ("cs", "ss", "ds", "es", "fs", "gs"):
        segments.v8086(0x100).apply(getattr(guest.sregs, name))
    guest.regs.rflags, guest.regs.rip = 0x20002, 0
    assert guest.check() == []


def test_the_tally_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """Not a judgement: how strict this back end is, for the reader of the log."""
    if not _tally:
        pytest.skip("no broken state was tried in this session")
    total = sum(map(len, _tally.values()))
    with capsys.disabled():
        print(f"\nbroken states on {describe_backend()}: {total} tried")
        for outcome, names in sorted(_tally.items()):
            print(f"  {outcome} {len(names)}: {', '.join(names)}")
    assert len({name for names in _tally.values() for name in names}) == total
