"""Reading and writing: slices, words, views, and every argument that is refused."""

from __future__ import annotations

import array
from collections.abc import Callable, Iterator

import pytest

from pykvm.errors import ClosedError, GuestMemoryError
from pykvm.memory import GuestMemory

TOP = 0x4000  # RAM is 0..TOP in two regions that adjoin at SEAM, and a ROM past a hole
SEAM = 0x2000
ROM = 0x10000


@pytest.fixture
def mem() -> Iterator[GuestMemory]:
    with GuestMemory(SEAM) as made:
        made.add_memfd(SEAM, TOP - SEAM)
        made.add(ROM, 0x1000, readonly=True)
        yield made


class TestSlices:
    def test_memory_begins_zeroed(self, mem: GuestMemory) -> None:
        assert mem[0:TOP] == bytes(TOP)

    def test_what_was_written_is_read(self, mem: GuestMemory) -> None:
        for gpa in (0, 0x123, SEAM - 5, SEAM - 2, SEAM, TOP - 5):
            for _ in "uncached", "cached":
                mem[gpa : gpa + 5] = b"hello"
                assert mem[gpa : gpa + 5] == mem.read(gpa, 5) == b"hello"
                assert type(mem[gpa : gpa + 5]) is bytes
                mem.write(gpa, b"world")
                assert mem[gpa : gpa + 5] == b"world"
                mem[gpa : gpa + 5] = bytes(5)
        assert mem[0:TOP] == bytes(TOP)

    @pytest.mark.parametrize(
        "data",
        [
            bytearray(b"abcdefgh"),
            memoryview(b"abcdefgh"),
            memoryview(b"xxabcdefghxx")[2:10],
            array.array("I", [0x64636261, 0x68676665]),
            memoryview(b"a.b.c.d.e.f.g.h.")[::2],
        ],
    )
    @pytest.mark.parametrize("gpa", [0x100, SEAM - 4])
    def test_anything_bytes_like_can_be_written(
        self, mem: GuestMemory, gpa: int, data: bytes
    ) -> None:
        for _ in "uncached", "cached":
            mem[gpa : gpa + 8] = data
            assert mem[gpa : gpa + 8] == b"abcdefgh"
            mem.fill(gpa, 8)
            mem.write(gpa, data)
            assert mem[gpa : gpa + 8] == b"abcdefgh"
            mem.fill(gpa, 8)

    @pytest.mark.parametrize("data", ["text", 5, None, [1, 2]])
    def test_what_is_not_bytes_like_is_a_type_error(self, mem: GuestMemory, data: bytes) -> None:
        mem[0:1] = b"x"
        for gpa in (0, SEAM - 1):
            with pytest.raises(TypeError, match="bytes-like object is required"):
                mem[gpa : gpa + 2] = data
            with pytest.raises(TypeError, match="bytes-like object is required"):
                mem.write(gpa, data)

    @pytest.mark.parametrize("gpa", [0x100, SEAM - 2])
    @pytest.mark.parametrize("data", [b"", b"abc", b"abcde"])
    def test_the_length_must_match(self, mem: GuestMemory, gpa: int, data: bytes) -> None:
        for _ in "uncached", "cached":
            with pytest.raises(ValueError, match=f"{len(data)} bytes do not fill .* are 4"):
                mem[gpa : gpa + 4] = data
            mem[gpa : gpa + 4] = bytes(4)

    def test_a_copy_onto_itself_moves(self, mem: GuestMemory) -> None:
        mem[0x100:0x108] = b"abcdefgh"
        mem[0x102:0x10A] = mem.view(0x100, 8)
        assert mem[0x100:0x10A] == b"ababcdefgh"
        mem[SEAM - 8 : SEAM] = b"abcdefgh"
        mem[SEAM - 2 : SEAM + 6] = mem.view(SEAM - 8, 8)
        assert mem[SEAM - 8 : SEAM + 6] == b"abcdefabcdefgh"

    def test_no_bytes_can_be_read_and_written_anywhere(self, mem: GuestMemory) -> None:
        for gpa in (0, SEAM, TOP, 1 << 60):
            assert mem[gpa:gpa] == mem.read(gpa, 0) == b""
            mem[gpa:gpa] = b""
            mem.write(gpa, b"")
            assert bytes(mem.view(gpa, 0)) == b""
            assert mem.covers(gpa, 0)

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            (slice(0, 8, 2), "without a step"),
            (slice(0, 8, 1), "without a step"),
            (slice(0, None), "both ends"),
            (slice(None, 8), "both ends"),
            (slice(None, None), "both ends"),
            (slice(8, 4), "ends before it begins"),
            (slice(-8, -4), "nothing counts from the end"),
            (slice(-1, 4), "nothing counts from the end"),
        ],
    )
    def test_a_slice_that_says_too_little_or_too_much_is_refused(
        self, mem: GuestMemory, key: slice, message: str
    ) -> None:
        for _ in "uncached", "cached":
            with pytest.raises(ValueError, match=message):
                mem[key]
            with pytest.raises(ValueError, match=message):
                mem[key] = b"1234"
            mem[0:8] = mem[0:8]

    @pytest.mark.parametrize("bad", [1.0, "1", True, None, b"1"])
    def test_an_address_that_is_no_int_is_a_type_error(self, mem: GuestMemory, bad: int) -> None:
        calls: list[Callable[[], object]] = [
            lambda: mem[bad],
            lambda: mem.u8[bad],
            lambda: mem.u32[bad],
            lambda: mem.u32.__setitem__(bad, 1),
            lambda: mem.read(bad, 4),
            lambda: mem.read(0, bad),
            lambda: mem.write(bad, b"1"),
            lambda: mem.load(bad, b"1"),
            lambda: mem.view(bad, 4),
            lambda: mem.view(0, bad),
            lambda: mem.fill(bad, 4),
            lambda: mem.fill(0, 4, bad),
            lambda: mem.cstring(bad),
            lambda: mem.region_at(bad),
        ]
        if bad is not None:
            calls += [lambda: mem[bad:8], lambda: mem[0:bad]]
        for _ in "uncached", "cached":
            for call in calls:
                with pytest.raises(TypeError):
                    call()
            mem.u8[0] = mem.u32[0] = mem[0]
            mem[0:2] = mem[0:2]

    def test_an_index_type_will_do(self, mem: GuestMemory) -> None:
        numpy = pytest.importorskip("numpy")
        at = numpy.uint64(0x100)
        for _ in "uncached", "cached":
            mem.u32[at] = numpy.uint32(0xDEADBEEF)
            mem[at : at + numpy.uint64(2)] = b"\x11\x22"
            assert mem.u32[at] == 0xDEAD2211
            assert mem.read(at, numpy.int8(4)) == b"\x11\x22\xad\xde"
            assert mem.u32[0x100] == 0xDEAD2211
            assert type(mem.u32[at]) is int

    def test_guest_memory_is_no_sequence(self, mem: GuestMemory) -> None:
        for thing in (mem, mem.u8):
            with pytest.raises(TypeError, match="not iterable"):
                iter(thing)


class TestOutside:
    @pytest.mark.parametrize(
        ("gpa", "length"),
        [
            (TOP, 1),
            (TOP - 1, 2),
            (0, TOP + 1),
            (SEAM - 1, TOP),
            (ROM - 1, 2),
            (ROM + 0x1000, 1),
            (1 << 52, 1),
            ((1 << 64) - 1, 1),
            ((1 << 64) - 1, 2),
            (1 << 64, 1),
            (1 << 200, 1),
            (0, 1 << 64),
            (0, 1 << 200),
            (-1, 1),
            (-1, 2),
            (-(1 << 64), 1),
            (0, -1),
            (4, -4),
        ],
    )
    def test_an_access_outside_ram_raises_and_writes_nothing(
        self, mem: GuestMemory, gpa: int, length: int
    ) -> None:
        for _ in "uncached", "cached":
            calls: list[Callable[[], object]] = [
                lambda: mem.read(gpa, length),
                lambda: mem.view(gpa, length),
                lambda: mem.fill(gpa, length, 0xFF),
            ]
            if 0 < length < 0x10000:
                calls += [
                    lambda: mem.write(gpa, b"\xff" * length),
                    lambda: mem.load(gpa, b"\xff" * length),
                ]
            if length >= 0:
                calls += [lambda: mem[gpa : gpa + length]]
            for call in calls:
                with pytest.raises(GuestMemoryError) as caught:
                    call()
                assert caught.value.gpa == gpa
                assert "RAM is 0x0-0x1fff" in str(caught.value) or "negative" in str(caught.value)
            assert not mem.covers(gpa, length)
            assert mem[0:TOP] == bytes(TOP)
            mem[0:1] = b"\0"

    @pytest.mark.parametrize("gpa", [-1, TOP - 1, TOP, 1 << 64, 1 << 200, -(1 << 70)])
    def test_a_word_outside_ram_raises(self, mem: GuestMemory, gpa: int) -> None:
        for _ in "uncached", "cached":
            with pytest.raises(GuestMemoryError):
                mem.u16[gpa]
            with pytest.raises(GuestMemoryError):
                mem.u16[gpa] = 0xFFFF
            mem.u16[TOP - 2] = mem.u16[TOP - 2]
        assert mem[0:TOP] == bytes(TOP)


class TestWords:
    @pytest.mark.parametrize("width", [1, 2, 4, 8])
    def test_words_are_little_endian_at_any_address(self, mem: GuestMemory, width: int) -> None:
        words = {1: mem.u8, 2: mem.u16, 4: mem.u32, 8: mem.u64}[width]
        value = int.from_bytes(range(0xF1, 0xF1 + width), "little")
        for gpa in (0, 1, 0x103, SEAM - width, *range(SEAM - 7, SEAM + 8), TOP - width):
            for _ in "uncached", "cached":
                mem.fill(0, TOP)
                words[gpa] = value
                assert words[gpa] == value
                assert mem[gpa : gpa + width] == bytes(range(0xF1, 0xF1 + width))
                assert mem[0:TOP].strip(b"\0") == bytes(range(0xF1, 0xF1 + width))

    @pytest.mark.parametrize("width", [1, 2, 4, 8])
    @pytest.mark.parametrize("gpa", [0x100, 0x101, SEAM - 1])
    def test_a_value_that_does_not_fit_is_refused(
        self, mem: GuestMemory, width: int, gpa: int
    ) -> None:
        words = {1: mem.u8, 2: mem.u16, 4: mem.u32, 8: mem.u64}[width]
        top = (1 << 8 * width) - 1
        for _ in "uncached", "cached":
            for value in (-1, top + 1, 1 << 100, -(1 << 100)):
                with pytest.raises(ValueError, match=f"does not fit u{8 * width}: 0..{top:#x}"):
                    words[gpa] = value
            for wrong in (1.0, "1", None, True, b"1"):
                with pytest.raises(TypeError, match="a value must be an int"):
                    words[gpa] = wrong  # type: ignore[assignment]
            assert words[gpa] == 0
            words[gpa] = top
            assert words[gpa] == top
            words[gpa] = 0

    def test_a_single_index_is_a_byte(self, mem: GuestMemory) -> None:
        mem[5] = 0xAB
        assert mem[5] == mem.u8[5] == 0xAB
        with pytest.raises(ValueError, match="does not fit u8"):
            mem[5] = 256
        with pytest.raises(GuestMemoryError):
            mem[-1]

    def test_words_can_be_added_to(self, mem: GuestMemory) -> None:
        mem.u64[8] += 3
        mem.u64[8] += 4
        assert mem.u64[8] == 7


class TestReadOnly:
    def test_the_hosts_writes_are_refused_but_for_load(self, mem: GuestMemory) -> None:
        mem.load(ROM + 2, b"\x55\xaa")
        writes: list[Callable[[], object]] = [
            lambda: mem.write(ROM, b"x"),
            lambda: mem.__setitem__(slice(ROM, ROM + 1), b"x"),
            lambda: mem.__setitem__(ROM, 1),
            lambda: mem.u8.__setitem__(ROM, 1),
            lambda: mem.u32.__setitem__(ROM, 1),
            lambda: mem.u32.__setitem__(ROM + 1, 1),
            lambda: mem.fill(ROM, 1),
        ]
        for write in writes:
            for _ in "uncached", "cached":
                with pytest.raises(GuestMemoryError, match="read-only, only load") as caught:
                    write()
                assert caught.value.gpa & ~1 == ROM
                mem.load(ROM, b"")
                assert mem[ROM : ROM + 4] == b"\0\0\x55\xaa"
        assert mem.u16[ROM + 2] == 0xAA55

    def test_its_views_are_read_only(self, mem: GuestMemory) -> None:
        mem.load(ROM, b"bios")
        for view in (mem.view(ROM, 4), mem.region_at(ROM).view()[:4]):
            assert view.readonly and bytes(view) == b"bios"
            with pytest.raises(TypeError, match="read-only"):
                view[0] = 1

    def test_a_write_into_ram_and_on_into_rom_writes_nothing(self) -> None:
        with GuestMemory("4K") as mem:
            mem.add(0x1000, "4K", readonly=True)
            with pytest.raises(GuestMemoryError, match="read-only"):
                mem.write(0xFFE, b"1234")
            assert mem[0xFFE:0x1002] == bytes(4)
            mem.load(0xFFE, b"1234")
            assert mem[0xFFE:0x1002] == b"1234"


class TestViews:
    def test_a_view_is_the_memory(self, mem: GuestMemory) -> None:
        for _ in "uncached", "cached":
            view = mem.view(0x100, 4)
            assert (len(view), view.format, view.readonly) == (4, "B", False)
            view[:] = b"abcd"
            assert mem[0x100:0x104] == b"abcd"
            mem.u32[0x100] = 0
            assert bytes(view) == bytes(4)

    def test_a_view_lies_in_one_region(self, mem: GuestMemory) -> None:
        mem.view(0, SEAM)
        mem.view(SEAM, TOP - SEAM)
        with pytest.raises(GuestMemoryError, match=r"0x1fff..0x2001 spans 2 regions"):
            mem.view(SEAM - 1, 2)

    def test_numpy_takes_regions_and_views_without_a_copy(self, mem: GuestMemory) -> None:
        numpy = pytest.importorskip("numpy")
        whole = numpy.asarray(mem.region_at(0))
        part = numpy.asarray(mem.view(0x100, 16)).view("<u4")
        assert whole.dtype == numpy.uint8 and whole.shape == (SEAM,)
        part[0] = 0x04030201
        assert whole[0x100:0x104].tolist() == [1, 2, 3, 4]
        assert mem.u32[0x100] == 0x04030201
        rom = numpy.asarray(mem.region_at(ROM))
        assert not rom.flags.writeable
        copied = numpy.array(mem.region_at(0))
        copied[0x100] = 99
        assert mem[0x100] == 1
        wide = numpy.asarray(mem.region_at(0), dtype="u4")
        assert wide[0x103] == 4


class TestFillFindCstring:
    def test_fill_sets_bytes_across_regions(self, mem: GuestMemory) -> None:
        mem.fill(SEAM - 3, 6, 0xCC)
        assert mem[SEAM - 4 : SEAM + 4] == b"\0" + b"\xcc" * 6 + b"\0"
        mem.fill(0, TOP)
        assert mem[0:TOP] == bytes(TOP)
        with pytest.raises(ValueError, match="does not fit a byte"):
            mem.fill(0, 1, 256)

    def test_fill_of_more_than_a_chunk(self) -> None:
        with GuestMemory("3M") as mem:
            mem.fill(1, (3 << 20) - 2, 7)
            assert mem.read(0, 3 << 20) == b"\0" + b"\7" * ((3 << 20) - 2) + b"\0"

    def test_find_gives_the_first_gpa_within_bounds(self, mem: GuestMemory) -> None:
        mem.write(0x100, b"needle")
        mem.write(SEAM - 3, b"needle")
        mem.load(ROM, b"needle")
        assert mem.find(b"needle") == 0x100
        assert mem.find(b"needle", 0x100, 0x106) == 0x100
        assert mem.find(b"needle", 0x100, 0x105) is None
        assert mem.find(b"needle", 0x101) == SEAM - 3
        assert mem.find(b"needle", SEAM - 3, SEAM + 3) == SEAM - 3
        assert mem.find(b"needle", SEAM - 3, SEAM + 2) is None
        assert mem.find(b"needle", SEAM - 2) == ROM
        assert mem.find(bytearray(b"needle"), ROM + 1) is None
        assert mem.find(bytes(TOP - SEAM + 1), SEAM - 3) is None
        assert mem.find(bytes(TOP), 0) is None
        mem.fill(0, TOP)
        assert mem.find(bytes(TOP)) == 0
        assert mem.find(b"x", -5, -1) is None
        with pytest.raises(ValueError, match="empty pattern"):
            mem.find(b"")

    def test_find_sees_every_way_to_lie_across_the_seam(self, mem: GuestMemory) -> None:
        for gpa in range(SEAM - 7, SEAM + 2):
            mem.fill(0, TOP)
            mem.write(gpa, b"needle")
            assert mem.find(b"needle") == gpa
            assert mem.find(b"needle", gpa, gpa + 6) == gpa
            assert mem.find(b"needle", gpa + 1) is mem.find(b"needle", 0, gpa + 5) is None

    def test_cstring_ends_at_a_nul(self, mem: GuestMemory) -> None:
        for gpa in (0x100, SEAM - 3):
            mem.write(gpa, b"hello\0world")
            assert mem.cstring(gpa) == b"hello"
            assert mem.cstring(gpa, 6) == b"hello"
            assert mem.cstring(gpa + 5) == b""
            with pytest.raises(GuestMemoryError, match=f"no NUL in the 5 bytes from {gpa:#x}"):
                mem.cstring(gpa, 5)
        mem.fill(TOP - 4, 4, 0x41)
        with pytest.raises(GuestMemoryError, match=f"{TOP:#x} is outside RAM"):
            mem.cstring(TOP - 4)
        with pytest.raises(GuestMemoryError):
            mem.cstring(0, 0)


def test_after_close_every_access_says_so() -> None:
    mem = GuestMemory("64K")
    mem[0:4] = mem[0:4]
    for words in (mem.u8, mem.u16, mem.u32, mem.u64):
        words[0] = words[0]
    mem.close()
    mem.close()
    assert mem.closed
    for call in (
        lambda: mem[0],
        lambda: mem[0:4],
        lambda: mem.__setitem__(slice(0, 4), b"1234"),
        lambda: mem.read(0, 1),
        lambda: mem.write(0, b"1"),
        lambda: mem.write(0, b""),
        lambda: mem.load(0, b"1"),
        lambda: mem.u8[0],
        lambda: mem.u64[0],
        lambda: mem.u64.__setitem__(0, 1),
        lambda: mem.view(0, 1),
        lambda: mem.fill(0, 1),
        lambda: mem.find(b"1"),
        lambda: mem.cstring(0),
        lambda: mem.region_at(0),
    ):
        with pytest.raises(ClosedError, match="this guest memory was closed"):
            call()
