"""Guest memory against the plainest model there is: a dict from gpa to byte."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pykvm.errors import GuestMemoryError
from pykvm.memory import GuestMemory

PAGE = 4096
PAGES = 24  # small, so that regions often adjoin, and holes are often hit
LAST = (1 << 52) - PAGE  # the last page there can be

pages = st.integers(0, PAGES - 1).map(lambda page: page * PAGE) | st.just(LAST)
near_edges = st.builds(lambda page, off: page + off, pages, st.integers(-20, 20))
inside = st.builds(lambda page, off: page + off, pages, st.integers(0, PAGE - 1))
any_int = st.integers() | st.sampled_from([-1, 1 << 32, 1 << 52, (1 << 64) - 1, 1 << 64])
gpas = near_edges | inside | near_edges | any_int
lengths = st.integers(0, 40) | st.sampled_from([PAGE - 1, PAGE, PAGE + 1, 3 * PAGE])
contents = st.binary(max_size=40) | st.integers(1, 255).map(lambda n: bytes([n]) * (PAGE + 7))


class Model(RuleBasedStateMachine):
    """Every operation is done to both, and both must do, or refuse, the same."""

    def __init__(self) -> None:
        super().__init__()
        self.mem = GuestMemory()
        self.model: dict[int, int] = {}
        self.rom: set[int] = set()
        self.views: list[tuple[int, memoryview]] = []

    def teardown(self) -> None:
        self.mem.close()
        for gpa, view in self.views:  # a view outlives the memory, with the contents it had
            assert bytes(view) == self.expected(gpa, len(view))
            view.release()

    def expected(self, gpa: int, length: int) -> bytes | None:
        if length > len(self.model):
            return None
        found = [self.model.get(at) for at in range(gpa, gpa + length)]
        return None if None in found else bytes(found)  # type: ignore[arg-type]

    def may_write(self, gpa: int, length: int) -> bool:
        if length and gpa < 0:
            return False
        return self.expected(gpa, length) is not None and not any(
            at // PAGE in self.rom for at in range(gpa, gpa + length)
        )

    def store(self, gpa: int, data: bytes) -> None:
        self.model.update(enumerate(data, gpa))

    @initialize()
    def first(self) -> None:
        self.add(0, 2, "anonymous", False)

    @rule(
        gpa=pages,
        count=st.integers(1, 4),
        kind=st.sampled_from(["anonymous", "memfd"]),
        readonly=st.booleans(),
    )
    def add(self, gpa: int, count: int, kind: str, readonly: bool) -> None:
        size = count * PAGE
        add = self.mem.add if kind == "anonymous" else self.mem.add_memfd
        fits = gpa + size <= 1 << 52
        if fits and not any(at in self.model for at in range(gpa, gpa + size, PAGE)):
            region = add(gpa, size, readonly=readonly)
            assert (region.guest_phys_addr, region.memory_size) == (gpa, size)
            self.store(gpa, bytes(size))
            if readonly:
                self.rom.update(range(gpa // PAGE, gpa // PAGE + count))
        else:
            with pytest.raises(ValueError, match="overlaps" if fits else "52 bits"):
                add(gpa, size, readonly=readonly)

    @rule(gpa=gpas, length=lengths)
    def read(self, gpa: int, length: int) -> None:
        expected = self.expected(gpa, length)
        if expected is None or gpa < 0:
            with pytest.raises(GuestMemoryError):
                self.mem.read(gpa, length)
            with pytest.raises(GuestMemoryError):
                self.mem[gpa : gpa + length]
        else:
            assert self.mem.read(gpa, length) == self.mem[gpa : gpa + length] == expected
        assert self.mem.covers(gpa, length) == (expected is not None and gpa >= 0)

    @rule(gpa=gpas, data=contents, how=st.sampled_from(["write", "slice", "load"]))
    def write(self, gpa: int, data: bytes, how: str) -> None:
        def act() -> None:
            if how == "write":
                self.mem.write(gpa, data)
            elif how == "load":
                self.mem.load(gpa, data)
            else:
                self.mem[gpa : gpa + len(data)] = data

        exists = gpa >= 0 and self.expected(gpa, len(data)) is not None
        if exists and (how == "load" or self.may_write(gpa, len(data))):
            act()
            self.store(gpa, data)
        else:
            with pytest.raises(GuestMemoryError):
                act()

    @rule(gpa=gpas, length=lengths, value=st.integers(0, 255))
    def fill(self, gpa: int, length: int, value: int) -> None:
        if gpa >= 0 and self.may_write(gpa, length):
            self.mem.fill(gpa, length, value)
            self.store(gpa, bytes([value]) * length)
        else:
            with pytest.raises(GuestMemoryError):
                self.mem.fill(gpa, length, value)

    @rule(gpa=gpas, width=st.sampled_from([1, 2, 4, 8]))
    def read_word(self, gpa: int, width: int) -> None:
        words = {1: self.mem.u8, 2: self.mem.u16, 4: self.mem.u32, 8: self.mem.u64}[width]
        expected = self.expected(gpa, width)
        if expected is None:
            with pytest.raises(GuestMemoryError):
                words[gpa]
        else:
            assert words[gpa] == int.from_bytes(expected, "little")

    @rule(gpa=gpas, width=st.sampled_from([1, 2, 4, 8]), value=any_int | st.integers(0, 255))
    def write_word(self, gpa: int, width: int, value: int) -> None:
        words = {1: self.mem.u8, 2: self.mem.u16, 4: self.mem.u32, 8: self.mem.u64}[width]
        if not 0 <= value < 1 << 8 * width:
            with pytest.raises(ValueError, match="does not fit"):
                words[gpa] = value
        elif self.may_write(gpa, width):
            words[gpa] = value
            self.store(gpa, value.to_bytes(width, "little"))
        else:
            with pytest.raises(GuestMemoryError):
                words[gpa] = value

    @precondition(lambda self: len(self.views) < 8)
    @rule(gpa=gpas, length=lengths, patch=st.binary(min_size=1, max_size=8))
    def view(self, gpa: int, length: int, patch: bytes) -> None:
        try:
            view = self.mem.view(gpa, length)
        except GuestMemoryError:
            here = [
                r
                for r in self.mem.regions
                if r.guest_phys_addr <= gpa and gpa + length <= r.end and length
            ]
            assert not here  # one region would have held it
            return
        expected = self.expected(gpa, length)
        assert bytes(view) == expected
        assert length == 0 or view.readonly == (gpa // PAGE in self.rom)
        if not view.readonly:
            patch = patch[:length]
            view[: len(patch)] = patch
            self.store(gpa, patch)
        self.views.append((gpa, view))

    @rule(gpa=gpas, max_length=lengths)
    def cstring(self, gpa: int, max_length: int) -> None:
        text = bytearray()
        for at in range(gpa, gpa + max_length):
            octet = self.model.get(at)
            if octet is None:
                break
            if octet == 0:
                assert self.mem.cstring(gpa, max_length) == text
                return
            text.append(octet)
        with pytest.raises(GuestMemoryError):
            self.mem.cstring(gpa, max_length)

    @rule(data=st.data(), start=gpas, stop=gpas | st.none())
    def find(self, data: st.DataObject, start: int, stop: int | None) -> None:
        at = data.draw(st.sampled_from([r.end - 3 for r in self.mem.regions]) | inside)
        wanted = self.expected(at, data.draw(st.sampled_from([1, 2, 6, PAGE + 5])))
        if wanted is None:
            wanted = data.draw(st.binary(min_size=1, max_size=3))
        found = self.mem.find(wanted, start, stop)
        bounds = range(max(start, 0), max(start, 1 << 52) if stop is None else stop)
        # Each stretch without a hole is one bytes object in the model.
        stretches: list[tuple[int, bytearray]] = []
        for region in self.mem.regions:
            if not stretches or stretches[-1][0] + len(stretches[-1][1]) < region.guest_phys_addr:
                stretches.append((region.guest_phys_addr, bytearray()))
            stretches[-1][1].extend(
                self.expected(region.guest_phys_addr, region.memory_size) or b""
            )
        for base, octets in stretches:
            low = min(max(bounds.start - base, 0), len(octets))
            high = min(max(bounds.stop - base, 0), len(octets))
            if (hit := octets.find(wanted, low, high)) >= 0:
                assert found == base + hit
                return
        assert found is None

    @invariant()
    def regions_are_sorted_and_apart(self) -> None:
        regions = self.mem.regions
        for low, high in itertools.pairwise(regions):
            assert low.end <= high.guest_phys_addr
        assert sum(r.memory_size for r in regions) == len(self.model) == self.mem.size


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
