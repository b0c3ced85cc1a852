"""Snapshots put a machine back to what it was: memory, every register, devices; and forks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import pykvm
from pykvm import result as reasons
from pykvm.errors import BusyError, ClosedError, SnapshotError
from pykvm.memory import GuestMemory
from pykvm.snapshot.image import pagemap
from pykvm.snapshot.reset import MODES, Tracking
from tests.kvm.test_virtio import PROBE, SERVED
from tests.kvm.test_virtio_blk import serve
from tests.support.vring_driver import Driver

ENTRY = 0x8000
DATA = 0x100000
PAGE = 4096

# Writes AL to rcx pages from rdi on, each at its beginning.
WRITER = "l: mov [rdi], rax; add rdi, 4096; dec rcx; jnz l; hlt"


@pytest.fixture
def machine() -> Iterator[pykvm.Machine]:
    with pykvm.Machine("4M") as m:
        yield m


def start(m: pykvm.Machine, code: str, mode: str = "long64", **options: int) -> None:
    m.load(pykvm.asm(code, mode=mode), at=ENTRY)  # type: ignore[arg-type]
    m.cpu.enter(mode, entry=ENTRY, **options)


def writer(m: pykvm.Machine, pages: int, value: int = 0xAB) -> None:
    start(m, WRITER)
    m.cpu.rdi, m.cpu.rcx, m.cpu.rax = DATA, pages, value


def contents(m: pykvm.Machine) -> bytes:
    return b"".join(m.memory[r.guest_phys_addr : r.end] for r in m.memory.regions)


def same(m: pykvm.Machine, s: pykvm.Snapshot) -> None:
    """All of memory and every register is as in the snapshot, by another snapshot."""
    with m.snapshot() as now:
        assert not s.diff(now), s.diff(now)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_memory_and_registers_come_back_by_every_way_of_tracking(
    machine: pykvm.Machine, mode: str
) -> None:
    machine._tracking = Tracking(machine.vm, machine.memory, mode)
    writer(machine, 20)
    machine.memory[DATA : DATA + 4] = b"seed"
    before = contents(machine)
    with machine.snapshot() as s:
        for turn in range(20):
            result = machine.run(timeout=10)
            assert result.reason == reasons.HALTED
            assert machine.memory.u64[DATA + 19 * PAGE] == 0xAB and machine.cpu.rcx == 0
            if turn % 3 == 0:
                machine.memory.u32[DATA + 40 * PAGE] = turn + 1  # the host's own writes
                machine.memory.write(DATA + 50 * PAGE, b"host")
                machine.memory.fill(DATA + 60 * PAGE, 2 * PAGE, 7)
            s.restore()
            assert contents(machine) == before, turn
            assert machine.cpu.rip == ENTRY and machine.cpu.rcx == 20
        same(machine, s)


def test_a_thousand_resets_with_everything_compared(machine: pykvm.Machine) -> None:
    generator = random.Random(5)
    writer(machine, 3)
    before = contents(machine)
    with machine.snapshot() as s:
        for turn in range(1000):
            # What comes between resets differs: pages, how many, which registers.
            machine.cpu.rdi = DATA + generator.randrange(256) * PAGE
            machine.cpu.rcx, machine.cpu.rax = generator.randrange(1, 8), turn + 1
            assert machine.run(timeout=10).reason == reasons.HALTED
            s.restore()
            if turn % 10 == 0:
                assert contents(machine) == before, turn
            assert (machine.cpu.rip, machine.cpu.rcx, machine.cpu.rdi) == (ENTRY, 3, DATA), turn
        same(machine, s)


def test_what_a_view_or_a_load_changed_comes_back(machine: pykvm.Machine) -> None:
    rom = machine.memory.add(0x800000, PAGE, readonly=True)
    machine.memory.load(0x800000, b"rom")
    early = machine.memory.view(DATA, 16)
    machine.memory.u8[DATA] = 1
    whole = machine.memory.region_at(0).view()
    start(machine, "hlt")
    with machine.snapshot() as s:
        s.restore()
        late = machine.memory.view(DATA + 3 * PAGE, 16)
        for _ in range(12):
            early[3] = 3
            late[0] = 9
            whole[DATA + 9 * PAGE] = 5
            machine.memory.load(rom.guest_phys_addr, b"changed")
            s.restore()
            assert bytes(early[:4]) == b"\1\0\0\0" and not any(late)
            assert machine.memory.u8[DATA + 9 * PAGE] == 0
            assert machine.memory.read(0x800000, 7) == b"rom\0\0\0\0"
    early.release()
    late.release()
    whole.release()


def test_vector_registers_and_msrs_come_back(machine: pykvm.Machine) -> None:
    # In ring 3, where every back end runs vector instructions natively.
    start(
        machine,
        "movq xmm3, rax; movq xmm9, rax; mov dx, 0x10; out dx, al; jmp $",
        ring=3,
        iopl=3,
    )
    machine.cpu.rax = 0x1122334455667788
    machine.pio.stop(0x10)
    with machine.snapshot() as s:
        assert machine.run(timeout=10).reason == reasons.STOPPED
        machine.cpu.msr["KERNEL_GS_BASE"] = 0x1234000
        debug = machine.cpu.vcpu.get_debugregs()
        debug.db[0] = 0x4000
        machine.cpu.vcpu.set_debugregs(debug)
        with machine.snapshot() as after:
            changed = {change.name for change in s.diff(after).registers}
        assert {"regs.rip", "msr 0xc0000102", "debugregs.db[0]"} <= changed
        assert any(name.startswith("xsave") for name in changed)
        s.restore()
        same(machine, s)


def test_an_open_access_is_completed_before_the_snapshot(machine: pykvm.Machine) -> None:
    start(machine, "in al, 0x20; mov bl, al; hlt")

    @machine.on_pio(0x20)
    def stop(access: object) -> int:
        machine.stop()
        return 0x5A

    assert machine.run(timeout=10).reason == reasons.STOPPED
    with machine.snapshot() as s:
        assert s.regs().rip == ENTRY + 2 and s.regs().rax & 0xFF == 0x5A
        for _ in range(2):
            assert machine.run(timeout=10).reason == reasons.HALTED
            assert machine.cpu.bl == 0x5A
            s.restore()
            assert machine.cpu.bl == 0


def test_a_machine_that_came_to_its_end_goes_on_after_a_restore(machine: pykvm.Machine) -> None:
    start(machine, "lidt [0x7000]; ud2")  # no handler for #UD, nor for what follows
    with machine.snapshot() as s:
        for _ in range(3):
            assert machine.run(timeout=10).reason == reasons.SHUTDOWN
            assert machine.cpu.ended
            s.restore()
            assert not machine.cpu.ended
        same(machine, s)


def test_two_snapshots_of_one_machine(machine: pykvm.Machine) -> None:
    writer(machine, 2)
    with machine.snapshot() as first:
        machine.run(timeout=10)
        with machine.snapshot() as second:
            diff = first.diff(second)
            assert {DATA, DATA + PAGE} <= set(diff.pages)
            assert "regs.rcx" in {change.name for change in diff.registers}
            for _ in range(3):
                first.restore()
                same(machine, first)
                second.restore()
                same(machine, second)
            machine.memory.u8[DATA + 9 * PAGE] = 1
            first.restore()
            same(machine, first)


def test_devices_go_back_too(machine: pykvm.Machine) -> None:
    fifo = machine.pio.fifo(0xE9)
    latch = machine.mmio.latch(0xD0000000).device
    start(machine, "mov al, 'x'; out 0xe9, al; in al, 0xe9; hlt")
    fifo.write(b"ab")
    with machine.snapshot() as s:
        for _ in range(3):
            machine.run(timeout=10)
            assert machine.cpu.al == ord("a")
            latch.set(4)
            s.restore()
            assert latch.bits == 0
        machine.run(timeout=10)
        assert fifo.read() == b"x" and machine.cpu.al == ord("a")


def test_a_device_in_python_is_found_by_its_methods(machine: pykvm.Machine) -> None:
    class Counter:
        count = 0

        def access(self, access: object) -> int:
            self.count += 1
            return self.count

        def state(self) -> dict[str, int]:
            return {"count": self.count}

        def restore(self, state: dict[str, int]) -> None:
            self.count = state["count"]

    counter = Counter()
    machine.on_pio(0x30, counter.access)
    start(machine, "in al, 0x30; in al, 0x30; hlt")
    with machine.snapshot() as s:
        for _ in range(3):
            machine.run(timeout=10)
            assert machine.cpu.al == 2
            s.restore()
        with pytest.raises(SnapshotError, match="lacks"):
            s.fork()
        with s.fork(lambda m: m.on_pio(0x30, Counter().access)) as other:
            other.run(timeout=10)
            assert other.cpu.al == 2


def test_forks_share_nothing_that_they_write(machine: pykvm.Machine) -> None:
    writer(machine, 4)
    machine.memory.write(DATA + 7 * PAGE, b"shared")
    with machine.snapshot() as s:
        with s.fork() as one, s.fork() as two:
            assert one.run(timeout=10).reason == reasons.HALTED
            assert one.memory.u64[DATA] == 0xAB
            assert two.memory.u64[DATA] == machine.memory.u64[DATA] == 0
            assert two.memory.read(DATA + 7 * PAGE, 6) == b"shared"
            with two.snapshot() as again:
                assert not s.diff(again).pages
            s.restore(one)
            same(one, s)
            two.cpu.rax = 0xCD
            two.run(timeout=10)
            assert two.memory.u64[DATA + PAGE] == 0xCD
        assert s.read(DATA, 8) == bytes(8)


def test_a_fork_outlives_machine_and_snapshot() -> None:
    with pykvm.Machine("2M") as m:
        m.pio.fifo(0xE9)
        start(m, "mov al, 'k'; out 0xe9, al; hlt")
        s = m.snapshot()
    fork = s.fork()
    s.close()
    with fork as other:
        assert other.run(timeout=10).reason == reasons.HALTED
        fifo = other.pio.find(0xE9)
        assert fifo is not None and fifo.device.read() == b"k"
    with pytest.raises(ClosedError):
        s.fork()


def test_what_cannot_be_is_refused(machine: pykvm.Machine) -> None:
    start(machine, "jmp $")
    s = machine.snapshot()
    running = machine.start()
    with pytest.raises(BusyError):
        machine.snapshot()
    with pytest.raises(BusyError):
        s.restore()
    running.stop()
    with (
        pykvm.Machine("2M") as smaller,
        pytest.raises(SnapshotError, match="memory map"),
    ):
        s.restore(smaller)
    with (
        pykvm.Machine("4M", cpus=2) as more,
        pytest.raises(SnapshotError, match="1 vCPUs"),
    ):
        s.restore(more)
    machine.memory.add(0x1000000, PAGE)
    with pytest.raises(SnapshotError, match="memory map"):
        s.restore()
    s.close()
    machine.close()
    with pytest.raises(ClosedError):
        machine.snapshot()


def test_kinds_of_memory(tmp_path: object) -> None:
    memory = GuestMemory("1M")
    memory.add_memfd(0x100000, "1M")
    with pykvm.Machine(memory) as m:
        start(m, WRITER)
        m.cpu.rdi, m.cpu.rcx, m.cpu.rax = 0xFF000, 2, 7  # over the seam
        with m.snapshot() as s:
            for _ in range(3):
                assert m.run(timeout=10).reason == reasons.HALTED
                assert m.memory.u64[0x100000] == 7
                s.restore()
                same(m, s)
            with s.fork() as other:
                other.run(timeout=10)
                assert other.memory.u64[0x100000] == 7
                assert m.memory.u64[0x100000] == 0


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_interrupt_controllers_timers_and_several_vcpus_come_back(irqchip: str) -> None:
    with pykvm.Machine("2M", cpus=2, irqchip=irqchip, pit=irqchip == "kernel") as m:
        code = "mov dx, 0x10; out dx, al; l: inc qword ptr [0x30000]; jmp l"
        m.load(pykvm.asm(code, mode="long64"), at=ENTRY)
        m.cpu.enter("long64", entry=ENTRY)
        m.pio.stop(0x10)
        with m.snapshot() as s:
            m.run(timeout=10)
            with m.snapshot() as later:
                m.run(timeout=0.05)
                lapic = m.cpus[1].vcpu.get_lapic()
                lapic.regs[0x80] = bytes([0x20])  # the task priority
                m.cpus[1].vcpu.set_lapic(lapic)
                later.restore()
                assert not later.diff(m.snapshot()).pages
            s.restore()
            assert m.cpu.rip == ENTRY and m.memory.u64[0x30000] == 0
            after = m.cpus[1].vcpu.get_lapic()
            assert after.regs[0x80] != b"\x20"
            with s.fork() as other:
                assert other.run(timeout=10).reason == reasons.STOPPED


def test_the_guests_time_stands_still(machine: pykvm.Machine) -> None:
    start(machine, "rdtsc; shl rdx, 32; or rax, rdx; hlt")
    with machine.snapshot() as s:
        if s.vcpus[0].tsc is None:
            pytest.skip("KVM_HAS_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET) says no")
        times = []
        for _ in range(5):
            machine.run(timeout=10)
            times.append(machine.cpu.rax)
            machine.run(timeout=0.02)
            s.restore()
        khz = machine.cpu.vcpu.get_tsc_khz()
        # Each run begins at the same moment: what differs is how long it took to get there.
        assert max(times) - min(times) < khz * 1000 // 2, times


def test_a_disks_overlay_goes_back_with_memory(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(64 * 1024))
    with pykvm.Machine("2M") as m:
        m.disk(image, overlay=True)
        m.load(pykvm.asm((PROBE + SERVED).replace("QUEUE", "0"), mode="long64"), at=ENTRY)
        driver = Driver(m.memory, 8, desc=0x20000, driver=0x21000, device=0x22000)
        m.memory.write(0x40000, b"first" * 100 + bytes(12))
        assert serve(m, driver, 1, 5, 0x40000, 512) == 0
        with m.snapshot() as s:
            s.save(tmp_path / "snapshot")
            index = driver.index
            for _ in range(3):
                driver.index = index
                m.memory.write(0x41000, b"later" * 100 + bytes(12))
                assert serve(m, driver, 1, 5, 0x41000, 512) == 0
                s.restore()
                driver.index = index
                assert serve(m, driver, 0, 5, 0x42000, 512) == 0
                assert m.memory.read(0x42000, 5) == b"first"
                s.restore()
                assert m.memory.read(0x42000, 5) == bytes(5)
            with pytest.raises(SnapshotError, match="lacks"):
                s.fork()
    with (
        pykvm.Snapshot.load(tmp_path / "snapshot") as s,
        s.fork(lambda m: m.disk(image, overlay=True)) as m,
    ):
        again = Driver(m.memory, 8, desc=0x20000, driver=0x21000, device=0x22000)
        again.index = index
        assert serve(m, again, 0, 5, 0x42000, 512) == 0
        assert m.memory.read(0x42000, 5) == b"first"


def test_a_region_that_came_later_is_in_later_snapshots(machine: pykvm.Machine) -> None:
    writer(machine, 2)
    with machine.snapshot() as s:
        s.restore()
    machine.memory.add(0x800000, "64K")
    with machine.snapshot() as s:
        for _ in range(3):
            machine.cpu.rdi = 0x800000
            machine.run(timeout=10)
            assert machine.memory.u64[0x801000] == 0xAB
            s.restore()
            same(machine, s)


def resident(m: pykvm.Machine) -> int:
    """Pages of a machine's memory that this process has."""
    return sum(
        int.from_bytes(pages[at : at + 8], "little") >> 62 != 0
        for region in m.memory.regions
        if (pages := pagemap(region)) is not None
        for at in range(0, len(pages), 8)
    )


def test_memory_that_nobody_touched_is_not_touched_by_snapshots() -> None:
    with pykvm.Machine("512M") as m:
        writer(m, 3)
        before = resident(m)
        with m.snapshot() as s, s.fork() as fork:
            s.restore()
            assert resident(m) <= before + 8
            fork.run(timeout=10)
            s.restore(fork)
            with fork.snapshot() as again:
                assert not s.diff(again)
            assert resident(fork) < 2000
            # A fork of another snapshot has nothing for granted.
            m.memory.write(0x10000000, b"other")
            with m.snapshot() as other:
                other.restore(fork)
                assert fork.memory.read(0x10000000, 5) == b"other"
                s.restore(fork)
                assert fork.memory.read(0x10000000, 5) == bytes(5)
