"""Registers as attributes, from both sides of an entry."""

from __future__ import annotations

import threading

import pytest

import pykvm
from pykvm import result as reasons
from pykvm.devices.access import PioAccess

GPRS = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{n}" for n in range(8, 16))]


@pytest.fixture
def cpu(m: pykvm.Machine) -> pykvm.Cpu:
    return m.cpu


def test_every_register_reaches_the_guest_and_comes_back(m: pykvm.Machine) -> None:
    m.load(pykvm.asm("; ".join(f"not {r}" for r in GPRS) + "; hlt"), at=0x8000)
    m.cpu.enter("long64", entry=0x8000)
    values = {r: 0x0123456789ABCDEF * (n + 1) & (1 << 64) - 1 for n, r in enumerate(GPRS)}
    for name, value in values.items():
        setattr(m.cpu, name, value)
    assert m.run(timeout=60).reason == reasons.HALTED
    for name, value in values.items():
        assert getattr(m.cpu, name) == value ^ (1 << 64) - 1, name


@pytest.mark.parametrize("sync_regs", [True, False])
def test_registers_do_without_sync_regs(m: pykvm.Machine, sync_regs: bool) -> None:
    """The same through KVM_GET_REGS and KVM_SET_REGS, as for a KVM without KVM_CAP_SYNC_REGS."""
    m.cpu._runner.c.sync_regs = sync_regs
    m.load(pykvm.asm("l: out 0x10,al; inc rbx; jmp l"), at=0x8000)
    m.cpu.enter("long64", entry=0x8000)
    seen: list[tuple[int, int]] = []

    @m.on_pio(0x10)
    def _(exit: PioAccess) -> None:
        seen.append((m.cpu.rbx, m.cpu.cs.selector))
        m.cpu.rbx += 10
        if len(seen) == 3:
            m.stop()

    m.run(timeout=60)
    assert [rbx for rbx, _ in seen] == [0, 11, 22]


def test_parts_of_registers_behave_as_the_hardware_has_them(cpu: pykvm.Cpu) -> None:
    cpu.rax = 0x1122334455667788
    assert (cpu.eax, cpu.ax, cpu.ah, cpu.al) == (0x55667788, 0x7788, 0x77, 0x88)
    cpu.al = 0xFF
    assert cpu.rax == 0x11223344556677FF
    cpu.ah = 0
    assert cpu.rax == 0x11223344556600FF
    cpu.ax = 0x1234
    assert cpu.rax == 0x1122334455661234
    cpu.eax = 1
    assert cpu.rax == 1
    cpu.r8 = (1 << 64) - 1
    cpu.r8b = 0
    assert cpu.r8 == 0xFFFFFFFFFFFFFF00
    cpu.r8d = 5
    assert cpu.r8 == 5


def test_flags_are_bools(cpu: pykvm.Cpu) -> None:
    cpu.rflags = 2
    cpu.cf = cpu.zf = True
    assert cpu.rflags == 0x43
    cpu.cf = False
    assert (cpu.cf, cpu.zf, cpu.interrupts) == (False, True, False)


@pytest.mark.parametrize(
    ("name", "value"), [("rax", 1 << 64), ("al", 256), ("eax", -1), ("cr0", 1 << 64), ("ah", 999)]
)
def test_a_value_that_does_not_fit_names_the_register(
    cpu: pykvm.Cpu, name: str, value: int
) -> None:
    with pytest.raises(ValueError, match=name):
        setattr(cpu, name, value)
    with pytest.raises(TypeError, match=name):
        setattr(cpu, name, "7")


def test_registers_take_whatever_is_an_integer(cpu: pykvm.Cpu) -> None:
    class Integer:
        """What NumPy's integers are."""

        def __index__(self) -> int:
            return 5

    cpu.rax = cpu.cr2 = cpu.cs.selector = Integer()  # type: ignore[assignment]
    assert (cpu.rax, cpu.cr2, cpu.cs.selector) == (5, 5, 5)


def test_what_goes_wrong_in_an_integer_comes_through(cpu: pykvm.Cpu) -> None:
    class Broken:
        def __index__(self) -> int:
            raise LookupError

    for name in ("rax", "cr2"):
        with pytest.raises(LookupError):
            setattr(cpu, name, Broken())


def test_a_misspelt_register_is_an_error(cpu: pykvm.Cpu) -> None:
    with pytest.raises(AttributeError):
        cpu.rxx = 1  # type: ignore[attr-defined]


def test_segments_and_tables_read_and_write(cpu: pykvm.Cpu) -> None:
    cpu.fs.base = 0x123456789
    cpu.gdt.base, cpu.gdt.limit = 0x5000, 0x7F
    cpu.gs = cpu.fs
    cpu.flush()
    sregs = cpu.vcpu.get_sregs()
    assert (sregs.fs.base, sregs.gs.base) == (0x123456789, 0x123456789)
    assert (sregs.gdt.base, sregs.gdt.limit) == (0x5000, 0x7F)
    with pytest.raises(ValueError, match=r"cs\.dpl"):
        cpu.cs.dpl = 4


def test_ioctls_below_and_attributes_above_agree(cpu: pykvm.Cpu) -> None:
    cpu.rbx = 7
    regs = cpu.vcpu.get_regs()
    assert regs.rbx == 7
    regs.rbx = 8
    cpu.vcpu.set_regs(regs)
    assert cpu.rbx == 8


def test_msrs_by_number_and_name(cpu: pykvm.Cpu) -> None:
    cpu.msr[0xC0000102] = 0xFFFF800000001000  # KERNEL_GS_BASE
    assert cpu.msr[0xC0000102] == cpu.msr["KERNEL_GS_BASE"] == 0xFFFF800000001000
    with pytest.raises(pykvm.PykvmError, match=r"(?i)0xdeadbeef"):
        cpu.msr[0xDEADBEEF]


def test_translate_shows_the_walk(m: pykvm.Machine) -> None:
    m.cpu.enter("long64", entry=0x8000)
    walk = m.cpu.translate(0x8123)
    assert walk.gpa == 0x8123 == m.cpu.vcpu.translate(0x8123).physical_address
    assert "PML4" in str(walk)
    assert m.cpu.translate(1 << 50).gpa is None


def test_whole_files_print(cpu: pykvm.Cpu) -> None:
    cpu.rax = 0xABCDEF
    assert "abcdef" in repr(cpu.regs).lower()
    assert "cr0" in str(cpu.sregs).lower()
    assert "rip" in repr(cpu).lower()


def test_a_fresh_state_passes_the_check(m: pykvm.Machine) -> None:
    for mode in ("real16", "prot32", "long64"):
        m.cpu.enter(mode, entry=0x8000)
        assert m.cpu.check() == []
    m.cpu.enter("long64", entry=0x8000, ring=3, iopl=3)
    assert m.cpu.check() == []


def test_a_vcpu_that_runs_is_busy_for_other_threads(m: pykvm.Machine) -> None:
    m.load(pykvm.asm("l: out 0x10,al; jmp l"), at=0x8000)
    m.cpu.enter("long64", entry=0x8000)
    caught: list[BaseException] = []

    def other() -> None:
        for touch in (lambda: m.cpu.rax, lambda: m.run(), lambda: m.cpu.flush(), m.close):
            try:
                touch()
            except BaseException as error:
                caught.append(error)
        m.stop()

    @m.on_pio(0x10)
    def _(exit: PioAccess) -> None:
        if not caught:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join(60)
        assert m.cpu.rip in (0x8000, 0x8002)

    assert m.run(timeout=60).reason == reasons.STOPPED
    assert [type(error) for error in caught] == [pykvm.BusyError] * 4


def test_a_stopped_vcpu_may_be_used_from_any_thread(m: pykvm.Machine) -> None:
    m.load(pykvm.asm("inc rbx; hlt"), at=0x8000)
    results: list[tuple[str, int]] = []

    def use() -> None:
        m.cpu.enter("long64", entry=0x8000)
        results.append((m.run(timeout=60).reason, m.cpu.rbx))

    for _ in range(3):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join(60)
    use()
    assert results == [(reasons.HALTED, n) for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("sync_regs", [True, False])
def test_cr8_reaches_the_guest_whoever_keeps_it(m: pykvm.Machine, sync_regs: bool) -> None:
    """Without a local APIC in the kernel, KVM_RUN takes CR8 from kvm_run.cr8, not from SREGS."""
    m.cpu._runner.c.sync_regs = sync_regs
    m.load(pykvm.asm("mov rbx, cr8; mov eax, 9; mov cr8, rax; hlt"), at=0x8000)
    m.cpu.enter("long64", entry=0x8000)
    m.cpu.cr8 = 5
    assert m.run(timeout=60).reason == reasons.HALTED
    assert (m.cpu.rbx, m.cpu.cr8) == (5, 9)
    m.cpu.cr8 = 6
    m.cpu.flush()
    m.cpu.rip = 0x8000
    assert m.run(timeout=60).reason == reasons.HALTED
    assert m.cpu.rbx == 6
