"""What is behind a region: seals, files, huge pages."""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from pathlib import Path

import pytest

from pykvm._abi import ffi
from pykvm.errors import CapabilityError, GuestMemoryError
from pykvm.memory import GuestMemory, Region
from tests.support.leaks import mappings_of

MIB = 1 << 20


def at_hva(region: Region, offset: int, length: int) -> bytes:
    """What the address that KVM is given really holds."""
    pointer = ffi.cast("char *", region.userspace_addr + offset)
    return bytes(ffi.buffer(pointer, length))


def smaps_of(region: Region) -> dict[str, str]:
    """Fields of the mapping that holds the region's first byte, from /proc/self/smaps."""
    found: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, _, rest = line.partition(" ")
        if not head.endswith(":"):
            low, _, high = head.partition("-")
            inside = int(low, 16) <= region.userspace_addr < int(high, 16)
        elif inside:
            found[head[:-1]] = rest.strip()
    return found


@pytest.mark.parametrize("kind", ["anonymous", "memfd", "shared file", "private file"])
@pytest.mark.parametrize("size", ["16K", "2M", "5M"])
def test_the_address_given_to_kvm_is_the_memory(tmp_path: Path, kind: str, size: str) -> None:
    with GuestMemory() as mem:
        if "file" in kind:
            path = tmp_path / "file"
            path.touch()
            os.truncate(path, 5 * MIB)
            region = mem.add_file(0x3000, path, size, shared=kind == "shared file")
        else:
            region = (mem.add if kind == "anonymous" else mem.add_memfd)(0x3000, size)
        mem.write(0x3004, b"first")
        mem.write(region.end - 4, b"last")
        assert region.kind == kind.split()[-1]
        assert at_hva(region, 0, 9) == b"\0\0\0\0first"
        assert at_hva(region, region.memory_size - 4, 4) == b"last"
        ffi.memmove(ffi.cast("char *", region.userspace_addr), b"KVM!", 4)
        assert mem[0x3000:0x3009] == b"KVM!first"
        assert mem.u32[0x3000] == int.from_bytes(b"KVM!", "little")


class TestMemfd:
    def test_it_cannot_be_shrunk_nor_unsealed(self) -> None:
        with GuestMemory() as mem:
            region = mem.add_memfd(0, "64K", name="ram")
            mem.write(0xFFFC, b"last")
            for size in (0, 4096, 65535):
                with pytest.raises(PermissionError):
                    os.ftruncate(region.fd, size)
            with pytest.raises(PermissionError):
                fcntl.fcntl(region.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
            assert os.fstat(region.fd).st_size == 65536
            assert mem.read(0xFFFC, 4) == b"last"
            assert os.readlink(f"/proc/self/fd/{region.fd}").startswith("/memfd:ram")
            assert not os.get_inheritable(region.fd)

    def test_another_mapping_of_its_descriptor_is_the_same_memory(self) -> None:
        with GuestMemory() as mem:
            region = mem.add_memfd(0x1000, "64K")
            with mmap.mmap(region.fd, 65536) as other:
                other[5:8] = b"abc"
                assert mem[0x1005:0x1008] == b"abc"
                mem.u8[0x1000] = 0x7F
                assert other[0] == 0x7F

    def test_a_name_the_kernel_refuses_leaves_nothing(self, no_leak: None) -> None:
        with GuestMemory() as mem:
            with pytest.raises(OSError, match="cannot map 4K of memfd: Invalid argument"):
                mem.add_memfd(0, "4K", name="x" * 300)
            assert mem.regions == ()


class TestFile:
    def test_private_writes_stay_private(self, backing_file: Path) -> None:
        with GuestMemory() as mem:
            region = mem.add_file(0x1000, backing_file)
            assert (region.memory_size, region.path, region.fd) == (0x4000, str(backing_file), -1)
            assert mem[0x1FFF:0x2001] == b"\1\2"
            mem.write(0x1000, b"mine")
            assert mem.read(0x1000, 4) == b"mine"
        assert backing_file.read_bytes()[:4] == b"\1\1\1\1"

    def test_shared_writes_reach_the_file(self, backing_file: Path) -> None:
        with GuestMemory() as mem:
            region = mem.add_file(0, str(backing_file), "8K", offset="4K", shared=True)
            assert mem[0:1] + mem[0x1FFF:0x2000] == b"\2\3"
            mem.write(0, b"ours")
            assert backing_file.read_bytes()[4096:4100] == b"ours"
            assert os.fstat(region.fd).st_ino == backing_file.stat().st_ino

    @pytest.mark.parametrize(
        ("size", "offset", "message"),
        [
            ("20K", 0, "is 0x4000 bytes long, too short for 0x5000 bytes from offset 0x0"),
            ("16K", "4K", "too short for 0x4000 bytes from offset 0x1000"),
            ("4K", "1M", "too short for 0x1000 bytes from offset 0x100000"),
            (None, "16K", "0x0 bytes from offset 0x4000 are not a whole number"),
            (None, "1M", "0x0 bytes from offset 0x100000 are not a whole number"),
            (0, 0, "0x0 bytes from offset 0x0 are not a whole number"),
            (100, 0, "0x64 bytes from offset 0x0 are not a whole number"),
            ("4K", 100, "file offset 0x64 is not a multiple of the page size"),
        ],
    )
    def test_what_the_file_does_not_hold_is_refused(
        self,
        backing_file: Path,
        size: str | int | None,
        offset: str | int,
        message: str,
        no_leak: None,
    ) -> None:
        with GuestMemory() as mem:
            with pytest.raises(ValueError, match=message):
                mem.add_file(0, backing_file, size, offset=offset)
            assert mem.regions == ()

    def test_a_file_that_ends_within_a_page_is_refused_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "odd"
        path.write_bytes(bytes(5000))
        with GuestMemory() as mem:
            with pytest.raises(ValueError, match=r"0x1388 bytes .* not a whole number"):
                mem.add_file(0, path)
            with pytest.raises(ValueError, match="too short for 0x2000"):
                mem.add_file(0, path, "8K")
            mem.add_file(0, path, "4K")

    def test_what_is_no_file_is_refused_and_nothing_hangs(
        self, tmp_path: Path, no_leak: None
    ) -> None:
        os.mkfifo(tmp_path / "fifo")
        with GuestMemory() as mem:
            for path in (tmp_path, tmp_path / "fifo", "/dev/zero"):
                with pytest.raises(ValueError, match="neither a regular file nor a block device"):
                    mem.add_file(0, path, "4K")
            with pytest.raises(FileNotFoundError):
                mem.add_file(0, tmp_path / "missing", "4K")

    def test_a_file_that_overlaps_is_let_go_again(
        self, backing_file: Path, recwarn: pytest.WarningsRecorder, no_leak: None
    ) -> None:
        with GuestMemory("64K") as mem:
            with pytest.raises(ValueError, match="overlaps the region 0x0-0xffff"):
                mem.add_file(0x8000, backing_file, shared=True)
            assert not mappings_of(str(backing_file))
        assert not recwarn.list  # it was closed, not left to the garbage collector

    def test_a_private_rom_can_be_patched_by_the_host(self, backing_file: Path) -> None:
        backing_file.chmod(stat.S_IRUSR)
        with GuestMemory() as mem:
            mem.add_file(0, backing_file, readonly=True)
            with pytest.raises(GuestMemoryError, match="read-only"):
                mem.write(0, b"x")
            mem.load(0, b"x")
            assert mem[0:2] == b"x\1"
        assert backing_file.read_bytes()[:1] == b"\1"

    def test_a_shared_rom_is_mapped_without_write_permission(self, backing_file: Path) -> None:
        with GuestMemory() as mem:
            region = mem.add_file(0, backing_file, shared=True, readonly=True)
            assert fcntl.fcntl(region.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            assert mappings_of(str(backing_file))[0].split()[1] == "r--s"
            assert (mem[0], mem.u32[0x1000], mem.u8[0x1001]) == (1, 0x02020202, 2)
            for _ in "uncached", "cached":
                with pytest.raises(GuestMemoryError, match="shared and read-only"):
                    mem.load(0, b"x")
                with pytest.raises(GuestMemoryError):
                    mem.u32[0] = 1
            assert mem.view(0, 4).readonly


class TestHugePages:
    """KVM maps a slot with large pages only where hva and gpa agree in their low 21 bits."""

    @pytest.mark.parametrize("gpa", [0, 0x1000, 0x100000, 0x1FF000, 0x12345000, 1 << 32])
    @pytest.mark.parametrize("huge", [None, "thp"])
    def test_the_hva_agrees_with_the_gpa(self, gpa: int, huge: str | None) -> None:
        for size in ("2M", "5M", "2052K"):
            with GuestMemory() as mem:
                region = mem.add(gpa, size, huge=huge)
                assert (region.userspace_addr ^ gpa) % (2 * MIB) == 0
                mem.u8[gpa] = 0xFF
                mem.u8[region.end - 1] = 0xFF
                assert (
                    mem.read(gpa, region.memory_size).strip(b"\0")
                    == b"\xff" + bytes(region.memory_size - 2) + b"\xff"
                )

    def test_the_advice_is_given_for_the_region(self) -> None:
        with GuestMemory() as mem:
            plain, advised = mem.add(0, "4M"), mem.add(4 * MIB, "4M", huge="thp")
            if "VmFlags" not in smaps_of(plain):
                pytest.skip("/proc/self/smaps has no VmFlags")
            assert "hg" in smaps_of(advised)["VmFlags"].split()
            assert "hg" not in smaps_of(plain)["VmFlags"].split()

    def test_advised_memory_is_made_of_huge_pages(self) -> None:
        policy = Path("/sys/kernel/mm/transparent_hugepage/enabled")
        if not policy.exists() or "[never]" in policy.read_text():
            pytest.skip(f"{policy} says never, or is missing")
        with GuestMemory() as mem:
            region = mem.add(0x1000, "8M", huge="thp")
            mem.fill(0x1000, 8 * MIB, 1)
            got = smaps_of(mem.region_at(0x1000))["AnonHugePages"]
            if got == "0 kB":
                # The kernel may have none to give: ask it for the same without pykvm.
                with mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_PRIVATE) as other:
                    other.madvise(mmap.MADV_HUGEPAGE)
                    other[:] = bytes(8 * MIB)
                    if "AnonHugePages:         0 kB" in Path("/proc/self/smaps_rollup").read_text():
                        pytest.skip("AnonHugePages stays 0 for a plain mmap too")
            # 3 of the 4 stretches of 2 MiB that the gpa's offset leaves whole.
            assert int(got.split()[0]) >= 3 * 2048, region

    def test_what_cannot_be_huge_is_refused(self) -> None:
        with GuestMemory() as mem:
            for add in (mem.add, mem.add_memfd):
                with pytest.raises(ValueError, match=r'None, "thp", "2M" or "1G", not .4M.'):
                    add(0, "4M", huge="4M")
                with pytest.raises(ValueError, match="1M is less than one huge page"):
                    add(0, "1M", huge="thp")
                with pytest.raises(ValueError, match="must be multiples of 2M"):
                    add(0, "1M", huge="2M")
                with pytest.raises(ValueError, match="must be multiples of 2M"):
                    add(0x1000, "2M", huge="2M")
                with pytest.raises(ValueError, match="must be multiples of 1G"):
                    add(1 << 30, "2M", huge="1G")
            assert mem.regions == ()

    @pytest.mark.parametrize("huge", ["2M", "1G"])
    @pytest.mark.parametrize("method", ["add", "add_memfd"])
    def test_more_hugetlb_pages_than_are_free_name_the_knob(
        self, huge: str, method: str, no_leak: None
    ) -> None:
        with (
            GuestMemory() as mem,
            pytest.raises(CapabilityError, match=r"nr_hugepages|has no .* huge pages") as caught,
        ):
            getattr(mem, method)(0, "16T", huge=huge)
        if "nr_hugepages" in str(caught.value):
            count = (16 << 40) // {"2M": 2 << 20, "1G": 1 << 30}[huge]
            assert f"{count} huge pages of {huge} are needed" in str(caught.value)
            if huge == "2M":
                assert "/proc/sys/vm/nr_hugepages" in str(caught.value)

    @pytest.mark.parametrize("method", ["add", "add_memfd"])
    def test_hugetlb_pages_are_reserved_and_used(self, method: str, no_leak: None) -> None:
        probe = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
        if not probe.exists() or int(probe.read_text()) < 2:
            pytest.skip(f"fewer than 2 free huge pages: {probe}")
        with GuestMemory() as mem:
            region = getattr(mem, method)(2 * MIB, "4M", huge="2M")
            mem.u64[6 * MIB - 8] = 42
            assert smaps_of(region)["KernelPageSize"] == "2048 kB"
            assert region.userspace_addr % (2 * MIB) == 0
            assert "huge=2M" in repr(mem)
            if method == "add_memfd":
                with pytest.raises(PermissionError):
                    os.ftruncate(region.fd, 0)
