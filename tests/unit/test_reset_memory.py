"""Putting memory back, and images of it: whatever was written, what comes back is what was."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pykvm._abi import ffi, lib
from pykvm.devices.virtio.queue import Queue
from pykvm.memory import GuestMemory
from pykvm.snapshot import image as images
from tests.support.vring_driver import WRITE, Driver

pytestmark = pytest.mark.sanitize

PAGE = 4096
PAGES = 130  # not a whole number of words
QUICK = settings(max_examples=60, deadline=None)

# (how, page, offset within it, length, value)
WRITES = st.lists(
    st.tuples(
        st.sampled_from(["write", "word", "fill", "load", "view", "region"]),
        st.integers(0, PAGES - 3),
        st.integers(0, PAGE - 1),
        st.integers(1, 2 * PAGE),
        st.integers(0, 255),
    ),
    max_size=12,
)


def apply(memory: GuestMemory, writes: list[tuple[str, int, int, int, int]]) -> None:
    for how, page, offset, length, value in writes:
        gpa = page * PAGE + offset
        data = bytes((value,)) * length
        if how == "write":
            memory.write(gpa, data)
        elif how == "word":
            memory.u64[gpa] = value
        elif how == "fill":
            memory.fill(gpa, length, value)
        elif how == "load":
            memory.load(gpa, data)
        elif how == "view":
            memory.view(gpa, length)[:] = data
        else:
            memory.region_at(gpa).view()[gpa] = value


def slot_of(memory: GuestMemory, image: images.Image) -> object:
    """As ``Tracking`` makes it, but for KVM's log."""
    (region,), (part,), writes = memory.regions, image.parts, memory.track()
    if region.exposed:
        writes.expose(region, 0, region.memory_size)
    pages = writes.of(region)
    slot = ffi.new("struct pykvm_reset_slot[1]")
    slot[0].memory = ffi.cast("uint8_t *", region.userspace_addr)
    slot[0].image = ffi.cast("uint8_t *", image.address(part))
    slot[0].held, slot[0].touched, slot[0].exposed = part.held, pages.touched, pages.exposed
    slot[0].pages = part.pages
    return slot


def reset(slot: object, mode: int, resets: int) -> tuple[int, int]:
    c = ffi.new("struct pykvm_reset *", {"slots": slot, "slot_count": 1, "mode": mode})
    c.resets, c.patience, c.vm_fd = resets, 1 << 40, -1
    assert lib.pykvm_reset_memory(c) == 0
    return int(c.looked), int(c.copied)


@QUICK
@given(before=WRITES, after=WRITES, mode=st.sampled_from([0, 1, 2]), resets=st.integers(0, 9))
def test_what_the_host_wrote_is_put_back(
    before: list[tuple[str, int, int, int, int]],
    after: list[tuple[str, int, int, int, int]],
    mode: int,
    resets: int,
) -> None:
    with GuestMemory(PAGES * PAGE) as memory:
        apply(memory, before)
        was = memory[0 : PAGES * PAGE]
        image = images.capture(memory)
        slot_of(memory, image)  # tracked from here on
        apply(memory, after)
        slot = slot_of(memory, image)
        looked, copied = reset(slot, mode, resets)
        assert memory[0 : PAGES * PAGE] == was
        assert copied <= looked <= PAGES
        if mode != lib.PYKVM_RESET_WHOLE:
            _, again = reset(slot, mode, 0)
            assert again == 0  # nothing was touched since, and what is exposed is as it was
        image.close()


@QUICK
@given(
    offsets=st.sets(st.integers(0, PAGES * PAGE - 1) | st.integers(0, 2 * PAGE), max_size=40),
    written=st.sets(st.integers(0, PAGES - 1) | st.integers(0, 2)),
)
@example(offsets={0, PAGE - 1, PAGE, 2 * PAGE - 1, 2 * PAGE}, written={1})
def test_stops_are_planted_on_pages_that_are_put_back_and_no_other_is_looked_at(
    offsets: set[int], written: set[int]
) -> None:
    with GuestMemory(PAGES * PAGE) as memory:
        memory.fill(0, PAGES * PAGE, 0x11)
        image = images.capture(memory)
        slot = slot_of(memory, image)
        expected = bytearray(memory[0 : PAGES * PAGE])
        for page in written:
            memory.fill(page * PAGE, PAGE, 0x22)
            for at in offsets:
                if at // PAGE == page:
                    expected[at] = 0xEC
        base = memory.regions[0].userspace_addr
        places = [ffi.cast("uint8_t *", base + at) for at in sorted(offsets)]
        c = ffi.new("struct pykvm_reset *", {"slots": slot, "slot_count": 1, "vm_fd": -1})
        plants = ffi.new("uint8_t *[]", places)
        c.plants, c.plant_count, c.plant, c.mode = plants, len(places), 0xEC, lib.PYKVM_RESET_LOG
        assert lib.pykvm_reset_memory(c) == 0
        assert memory[0 : PAGES * PAGE] == bytes(expected)
        image.close()


@QUICK
@given(first=WRITES, second=WRITES)
def test_images_hold_what_memory_was_and_tell_what_differs(
    first: list[tuple[str, int, int, int, int]], second: list[tuple[str, int, int, int, int]]
) -> None:
    with GuestMemory(PAGES * PAGE) as memory:
        apply(memory, first)
        old, one = memory[0 : PAGES * PAGE], images.capture(memory)
        apply(memory, second)
        new, two = memory[0 : PAGES * PAGE], images.capture(memory)
    assert one.read(0, PAGES * PAGE) == old and two.read(0, PAGES * PAGE) == new
    ((part, bitmap, count),) = images.differing(one, two)
    found = [first + n for first, length in part.runs(bitmap) for n in range(length)]
    expected = [
        page
        for page in range(PAGES)
        if old[page * PAGE : (page + 1) * PAGE] != new[page * PAGE : (page + 1) * PAGE]
    ]
    assert found == expected and count == len(expected)
    with GuestMemory() as copy:
        two.map_into(copy)
        assert copy[0 : PAGES * PAGE] == new
    assert two.held == PAGE * sum(
        any(new[page * PAGE : (page + 1) * PAGE]) for page in range(PAGES)
    )
    one.close()
    two.close()


@given(
    st.sampled_from([b"", b"\0" * 500, b"\xff" * 500, b"\x81" * 520, b"\xff" * 1024]),
    st.binary(max_size=40),
    st.integers(0, 7),
)
def test_runs_are_the_set_bits(before: bytes, after: bytes, spare: int) -> None:
    bitmap = before + after  # across the pieces in which they are looked at
    pages = max(0, len(bitmap) * 8 - spare)
    bits = {n for n in range(pages) if bitmap[n // 8] >> n % 8 & 1}
    runs = list(images.runs(bitmap, pages))
    assert {first + n for first, length in runs for n in range(length)} == bits
    assert all(a[0] + a[1] < b[0] for a, b in pairwise(runs))


def test_the_time_for_runs_grows_as_memory_does() -> None:
    """4 GiB of which every other page is zeros took two minutes, and a guest can make it so."""
    began = time.process_time()
    assert sum(1 for _ in images.runs(b"\x55" * (1 << 17), 1 << 20)) == 1 << 19
    assert time.process_time() - began < 20


def test_what_devices_write_is_noted() -> None:
    with GuestMemory("1M") as memory:
        ring = Driver(memory, 8, desc=0x1000, driver=0x2000, device=0x3000)
        queue = Queue(0, 8, memory)
        queue.set_size(8)
        for part in ("desc", "driver", "device"):
            queue.set_address(part, getattr(ring, part))
        queue.enable()
        pages = memory.track().of(memory.regions[0])
        ring.send((0x50000, 100, 0), (0x40FF0, 32, WRITE))
        pages.touched[0] = pages.touched[1] = 0
        chain = queue.pop()
        assert chain is not None and chain.write(b"x" * 32) == 32
        assert pages.touched[1] == 0b11 and pages.touched[0] == 0
        queue.push(chain, 32)
        assert pages.exposed[0] == 1 << 3  # the used ring
        assert not pages.exposed[1]
