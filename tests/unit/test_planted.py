"""Stops planted in memory: the guest's own bytes are never lost."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pykvm._abi import ffi, lib
from pykvm.debug import planted as module
from pykvm.debug.planted import IN_AL_DX, Ordered, Planted
from pykvm.errors import GuestMemoryError
from pykvm.memory import GuestMemory

SIZE = 0x3000
PLACES = st.sampled_from([0, 1, 5, 0xFFF, 0x1000, 0x1005, SIZE - 1])
CODE = bytes((n * 7 + n // 256) % 256 for n in range(SIZE))


def offsets(c: SimpleNamespace) -> set[int]:
    """The offsets in a page that C was told of."""
    if not c.planted:
        return set()
    return {n for n in range(0x1000) if c.planted.offsets[n // 64] >> n % 64 & 1}


def memory() -> GuestMemory:
    made = GuestMemory(SIZE)
    made.write(0, CODE)
    return made


def test_a_stop_is_there_until_the_last_who_wants_it_removes_it() -> None:
    c = SimpleNamespace(planted=ffi.NULL, access=SimpleNamespace(pending=lib.PYKVM_IDLE))
    with memory() as ram:
        planted = Planted(ram, [c])
        planted.plant(0x1005)
        planted.plant(0x1005)
        assert ram[0x1005] == IN_AL_DX and list(planted) == [(0x1005, CODE[0x1005])]
        planted.remove(0x1005)
        assert 0x1005 in planted and offsets(c) == {5}
        planted.remove(0x1005)
        planted.remove(0x1005)
        assert ram[0x1005] == CODE[0x1005]
        planted.settle()
        assert not c.planted


def test_a_stop_that_went_while_vcpus_run_is_known_until_they_stand() -> None:
    cpus = [
        SimpleNamespace(planted=ffi.NULL, access=SimpleNamespace(pending=lib.PYKVM_IDLE))
        for _ in range(2)
    ]
    with memory() as ram:
        planted = Planted(ram, cpus)
        for gpa, code in ((0x10, b"\x48\x89"), (0x20, b"\xec"), (0x30, b"\xf3\x6c")):
            ram.write(gpa, code)
            planted.plant(gpa)
            planted.remove(gpa)
            planted.plant(gpa)
            planted.remove(gpa)
        assert not len(planted) and offsets(cpus[1]) == {0x10, 0x20, 0x30}
        assert planted.was_at(0x10) and not planted.was_at(0x1010)
        assert not planted.was_at(0x20) and not planted.was_at(0x30)  # the guest's own INs
        cpus[1].access.pending = lib.PYKVM_UNSERVED
        planted.settle()
        assert planted.was_at(0x10)
        cpus[1].access.pending = lib.PYKVM_IDLE
        planted.settle()
        assert not planted.was_at(0x10) and not cpus[0].planted


def test_where_there_is_no_memory_nothing_is_planted() -> None:
    with memory() as ram:
        planted = Planted(ram, [])
        with pytest.raises(GuestMemoryError):
            planted.plant(SIZE)
        assert len(planted) == 0


def test_memory_written_from_a_copy_gets_its_stops_back() -> None:
    with memory() as ram:
        planted = Planted(ram, [])
        planted.plant(0x10)
        with planted.lifted():
            copy = ram.read(0, SIZE)
        assert copy == CODE and ram[0x10] == IN_AL_DX
        ram.write(0, b"\x90" * SIZE)  # another copy: the code is another now
        planted.put_back()
        assert ram[0x10] == IN_AL_DX
        planted.clear()
        assert ram.read(0, SIZE) == b"\x90" * SIZE


def test_an_in_of_the_guests_own_is_known_from_a_planted_one_while_it_is_lifted() -> None:
    with memory() as ram:
        ram[0x20:0x21] = bytes([IN_AL_DX])
        planted = Planted(ram, [])
        planted.plant(0x20)
        assert planted.stops_at(0x20)
        with planted.lifted([0x20]):
            assert not planted.stops_at(0x20) and ram[0x20] == IN_AL_DX
        assert planted.stops_at(0x20) and not planted.stops_at(0x21) and not planted.stops_at(None)


def test_a_stop_removed_while_it_is_lifted_leaves_what_was_written() -> None:
    with memory() as ram:
        planted = Planted(ram, [])
        planted.plant(0x20)
        with planted.lifted():
            ram[0x20:0x21] = bytes([IN_AL_DX])
            planted.remove(0x20)
            assert ram[0x20] == IN_AL_DX
        assert ram[0x20] == IN_AL_DX


def test_code_that_the_guest_has_written_over_a_stop_is_left_to_it() -> None:
    with memory() as ram:
        planted = Planted(ram, [])
        planted.plant(0x20)
        ram[0x20:0x21] = b"\xf4"
        planted.remove(0x20)
        assert ram[0x20] == 0xF4


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("plant"), PLACES),
        st.tuples(st.just("remove"), PLACES),
        st.tuples(st.just("write"), PLACES, st.integers(0, 255)),
        st.tuples(st.just("wrote"), PLACES, st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("look"), PLACES),
        st.tuples(st.just("clear")),
    ),
    max_size=30,
)


@given(OPERATIONS)
@example([("plant", 0x1000), ("write", 0x1000, IN_AL_DX)])  # an IN of the guest's own
def test_what_the_guest_knows_is_what_it_wrote(operations: list[tuple]) -> None:  # type: ignore[type-arg]
    c = SimpleNamespace(planted=ffi.NULL, access=SimpleNamespace(pending=lib.PYKVM_IDLE))
    with memory() as ram:
        planted, model, users = Planted(ram, [c]), bytearray(CODE), dict[int, int]()
        for name, *arguments in operations:
            if name == "plant":
                planted.plant(arguments[0])
                users[arguments[0]] = users.get(arguments[0], 0) + 1
            elif name == "remove":
                planted.remove(arguments[0])
                users[arguments[0]] = max(0, users.get(arguments[0], 0) - 1)
            elif name == "write":  # while they are lifted, as who restores a copy
                with planted.lifted():
                    model[arguments[0]] = arguments[1]
                    ram.write(arguments[0], bytes([arguments[1]]))
            elif name == "wrote":
                at, data = arguments[0], arguments[1][: SIZE - arguments[0]]
                ram.write(at, data)
                planted.wrote(at, data)
                model[at : at + len(data)] = data
            elif name == "look":
                read = ram.read(arguments[0] & ~7, 8)
                at = arguments[0] & ~7
                assert planted.hide(at, read) == bytes(model[at : at + 8])
            else:
                planted.clear()
                users.clear()
            wanted = {gpa for gpa, count in users.items() if count}
            assert {gpa for gpa, _ in planted} == wanted
            assert offsets(c) >= {gpa % 0x1000 for gpa in wanted}
            planted.settle()
            assert offsets(c) == {gpa % 0x1000 for gpa in wanted}
            assert all(ram[gpa] == IN_AL_DX for gpa in wanted)
        planted.clear()
        assert ram.read(0, SIZE) == bytes(model)


@pytest.mark.parametrize("most", [0, 2, 64])
@given(operations=OPERATIONS, looks=st.lists(st.booleans(), min_size=30, max_size=30))
def test_resets_are_given_all_places_in_order(
    most: int,
    operations: list[tuple],  # type: ignore[type-arg]
    looks: list[bool],
) -> None:
    """Whether changes are followed one by one, or all is looked at because there are many."""
    reset = ffi.new("struct pykvm_reset *")
    with memory() as ram, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MOST_FOLLOWED", most)
        patch.setattr(module, "_MOST_NOTED", 3 * most)
        ram.add(0x10000, 0x1000)
        planted = Planted(ram, [])
        ordered = Ordered(planted)
        for (name, *arguments), looks_now in zip(operations, looks, strict=False):
            if name == "plant":
                planted.plant(arguments[0])
            elif name == "remove":
                planted.remove(arguments[0])
            elif name == "clear":
                planted.clear()
            else:
                planted.plant(0x10000 + arguments[0] % 0x1000)
            if looks_now:
                ordered.give(reset)
                expected = sorted(planted.host(gpa) for gpa, _ in planted)
                found = [reset.plants[n] for n in range(reset.plant_count)]
                assert [int(ffi.cast("uintptr_t", each)) for each in found] == expected
                assert reset.plant == IN_AL_DX


def test_another_byte_below_a_stop_is_told() -> None:
    with memory() as ram:
        planted = Planted(ram, [])
        planted.plant(0x10)
        planted.plant(0x10)
        assert planted.renewed == 1
        with planted.lifted():
            pass
        planted.put_back()
        planted.remove(0x10)
        assert planted.renewed == 1
        with planted.lifted():
            ram.write(0x10, b"\x90")
        assert planted.renewed == 2
        planted.wrote(0x10, b"\x90")
        assert planted.renewed == 2
        planted.wrote(0x10, b"\x91")
        assert planted.renewed == 3
