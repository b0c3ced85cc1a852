"""Guest memory as a guest sees it: each kind of backing, ROMs, holes, huge pages, dirty pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pykvm._abi import lib
from pykvm.arch.x86_64.modes import enter
from pykvm.errors import ClosedError
from pykvm.kvm import Vcpu, Vm
from pykvm.kvm.exits import HltExit, MmioExit
from pykvm.memory import GuestMemory, Region, backing

MIB = 1 << 20
CODE = 0x1000
DATA = 0x20000  # what ds begins at


def register(vm: Vm, region: Region) -> None:
    vm.set_user_memory_region(
        slot=region.slot,
        flags=region.flags,
        guest_phys_addr=region.guest_phys_addr,
        memory_size=region.memory_size,
        userspace_addr=region.userspace_addr,
    )


@pytest.fixture
def mem(vm: Vm) -> Iterator[GuestMemory]:
    """64 KiB at 0, and whatever else a test adds; the VM hears of it all."""
    with GuestMemory("64K") as made:
        made.attach(lambda region: register(vm, region))
        yield made


def start_real16(vcpu: Vcpu, mem: GuestMemory, code: str) -> None:
    """Put the vCPU before ``code`` in real mode, with ds at DATA."""
    mem.write(CODE, bytes.fromhex(code))
    sregs = vcpu.get_sregs()
    sregs.cs.base, sregs.cs.selector = 0, 0
    sregs.ds.base, sregs.ds.selector = DATA, DATA >> 4
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip, regs.rflags, regs.rax = CODE, 2, 0
    vcpu.set_regs(regs)


# mov al, [0]; inc al; mov [0x1fff], al; hlt
READ_THEN_WRITE = "a00000 fec0 a2ff1f f4"


@pytest.mark.parametrize("kind", ["anonymous", "memfd", "private file", "shared file"])
def test_guest_and_host_see_one_memory(
    vcpu: Vcpu, mem: GuestMemory, tmp_path: Path, kind: str
) -> None:
    file = tmp_path / "ram"
    file.write_bytes(bytes(0x2000))
    if kind == "anonymous":
        mem.add(DATA, "8K")
    elif kind == "memfd":
        mem.add_memfd(DATA, "8K")
    else:
        mem.add_file(DATA, file, shared=kind == "shared file")
    view = mem.view(DATA + 0x1FFF, 1)
    mem.u8[DATA] = 0x41
    start_real16(vcpu, mem, READ_THEN_WRITE)
    assert vcpu.run() == HltExit()
    assert mem[DATA + 0x1FFF] == view[0] == 0x42
    assert file.read_bytes()[0x1FFF] == (0x42 if kind == "shared file" else 0)


def test_a_guest_access_may_span_regions_that_adjoin(vcpu: Vcpu, mem: GuestMemory) -> None:
    mem.add(DATA, "4K")
    mem.add_memfd(DATA + 0x1000, "4K")
    # mov ax, [0xfff]; inc ax; mov [0xfff], ax; hlt
    start_real16(vcpu, mem, "a1ff0f 40 a3ff0f f4")
    mem.u16[DATA + 0xFFF] = 0x12FF
    assert vcpu.run() == HltExit()
    assert mem.u16[DATA + 0xFFF] == 0x1300
    assert mem[DATA + 0xFFF : DATA + 0x1001] == b"\x00\x13"


def test_a_guest_access_to_a_hole_exits(vcpu: Vcpu, mem: GuestMemory) -> None:
    mem.add(DATA + 0x2000, "4K")
    start_real16(vcpu, mem, READ_THEN_WRITE)
    assert vcpu.run() == MmioExit(phys_addr=DATA, size=1, is_write=False, data=b"")
    vcpu.complete_mmio(b"\x41")
    assert vcpu.run() == MmioExit(DATA + 0x1FFF, 1, True, b"\x42")


@pytest.mark.cap("KVM_CAP_READONLY_MEM")
@pytest.mark.parametrize("kind", ["anonymous", "memfd", "private file", "shared file"])
def test_a_guest_reads_a_rom_and_its_writes_exit(
    vcpu: Vcpu, mem: GuestMemory, tmp_path: Path, kind: str
) -> None:
    file = tmp_path / "rom"
    file.write_bytes(b"\x41" + bytes(0x1FFF))
    if "file" in kind:
        rom = mem.add_file(DATA, file, shared=kind == "shared file", readonly=True)
    else:
        rom = (mem.add if kind == "anonymous" else mem.add_memfd)(DATA, "8K", readonly=True)
        mem.load(DATA, b"\x41")
    assert rom.flags == lib.KVM_MEM_READONLY
    start_real16(vcpu, mem, READ_THEN_WRITE)
    assert vcpu.run() == MmioExit(DATA + 0x1FFF, 1, True, b"\x42")
    assert vcpu.run() == HltExit()
    assert mem[DATA : DATA + 0x2000] == b"\x41" + bytes(0x1FFF)


def test_a_region_that_logs_tells_which_page_the_guest_wrote(
    vm: Vm, vcpu: Vcpu, mem: GuestMemory
) -> None:
    region = mem.add(DATA, "16K", log_dirty=True)
    start_real16(vcpu, mem, READ_THEN_WRITE)
    assert vcpu.run() == HltExit()
    assert int.from_bytes(vm.get_dirty_log(region.slot), "little") == 0b0010
    region.log_dirty = False
    register(vm, region)
    with pytest.raises(OSError, match="KVM_GET_DIRTY_LOG"):
        vm.get_dirty_log(region.slot)


def pages_mapped(vm: Vm, vcpu: Vcpu, mem: GuestMemory) -> dict[str, int]:
    """Have a 64-bit guest touch every page of 4..8 MiB; return KVM's count of mapped pages."""
    # mov ecx, 4M; 1: inc byte [rcx]; add rcx, 4096; cmp rcx, 8M; jb 1b; mov [0x10000000], al
    code = "b900004000 fe01 4881c100100000 4881f900008000 72ee 88042500000010"
    mem.write(0x8000, bytes.fromhex(code))
    vcpu.set_cpuid2(vm.kvm.get_supported_cpuid())
    sregs, regs = vcpu.get_sregs(), vcpu.get_regs()
    # Where ring 0 is emulated, only ring 3 uses the MMU.
    enter("long64", sregs=sregs, regs=regs, memory=mem, entry=0x8000, ring=3)
    vcpu.set_sregs(sregs)
    vcpu.set_regs(regs)
    exit = vcpu.run()
    assert isinstance(exit, MmioExit) and exit.phys_addr == 0x10000000
    assert mem[4 * MIB] == mem[8 * MIB - 4096] == 1
    with vm.get_stats_fd() as stats:
        values = stats.read()
    counts = {}
    for name in ("pages_4k", "pages_2m"):
        count = values[name]
        assert isinstance(count, int)
        counts[name] = count
    return counts


def huge_kib() -> int:
    """KiB of this process in transparent huge pages."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(text.partition("AnonHugePages:")[2].split()[0])


@pytest.mark.cap("KVM_CAP_BINARY_STATS_FD")
@pytest.mark.parametrize("agree", [True, False])
def test_kvm_maps_large_pages_only_where_hva_and_gpa_agree(
    vm: Vm, vcpu: Vcpu, monkeypatch: pytest.MonkeyPatch, agree: bool
) -> None:
    if not agree:
        # Placed for another gpa, the hva disagrees by a page.
        place = backing.anonymous
        monkeypatch.setattr(
            backing, "anonymous", lambda gpa, size, huge: place(gpa + 0x1000, size, huge)
        )
    before = huge_kib()
    with GuestMemory() as mem:
        region = mem.add(0, "8M", huge="thp")
        assert (region.userspace_addr % (2 * MIB) == 0) == agree
        mem.fill(0, 8 * MIB)
        if huge_kib() < before + 3 * 2048:
            pytest.skip("AnonHugePages of /proc/self/smaps_rollup does not grow: no huge pages")
        register(vm, region)
        mapped = pages_mapped(vm, vcpu, mem)
    if agree:
        assert mapped["pages_2m"] >= 2
        assert mapped["pages_4k"] < 1024
    else:
        assert mapped["pages_2m"] == 0
        assert mapped["pages_4k"] >= 1024


@pytest.mark.parametrize("method", ["add", "add_memfd"])
def test_a_guest_runs_in_hugetlb_pages(vm: Vm, vcpu: Vcpu, method: str) -> None:
    probe = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    if not probe.exists() or int(probe.read_text()) < 4:
        pytest.skip(f"fewer than 4 free huge pages: {probe}")
    with GuestMemory() as mem:
        register(vm, getattr(mem, method)(0, "8M", huge="2M"))
        assert pages_mapped(vm, vcpu, mem)["pages_2m"] >= 2


def test_a_view_outlives_the_machine_and_keeps_what_the_guest_wrote(no_leak: None) -> None:
    import pykvm

    with pykvm.Machine(memory="2M") as m:
        m.mem.write(0x8000, bytes.fromhex("c6060090 5a f4"))  # mov byte [0x9000], 0x5a; hlt
        m.cpu.enter("real16", entry=0x8000)
        view = m.mem.view(0x9000, 1)
        assert m.run(timeout=5).reason == "halted"
    assert view[0] == 0x5A
    with pytest.raises(ClosedError):
        m.mem.view(0x9000, 1)
    view[0] = 1
    assert view[0] == 1
