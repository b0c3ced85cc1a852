"""The block device: what it makes of requests, right ones and wrong ones."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.devices.disk.base import Disk
from pykvm.devices.disk.overlay import OverlayDisk
from pykvm.devices.disk.raw import RawDisk, open_raw
from pykvm.devices.virtio import blk
from pykvm.devices.virtio import blk_request as req
from pykvm.devices.virtio.blk import Blk
from pykvm.devices.virtio.blk_request import S_IOERR, S_OK, S_UNSUPP
from pykvm.errors import GuestError
from tests.support.chains import BlkDriver, FakeChain

SECTORS = 256
CONTENT = bytes(n // 512 & 0xFF for n in range(SECTORS * 512))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def device(image: Path) -> Iterator[Blk]:
    with open_raw(image) as disk:
        yield Blk(disk, serial="SN-1")


@pytest.fixture
def driver(device: Blk) -> BlkDriver:
    return BlkDriver(device)


def header(type: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", type, 0xFFFFFFFF, sector)


# ---- what works --------------------------------------------------------------------------------


def test_sectors_are_read_into_the_drivers_memory(driver: BlkDriver) -> None:
    assert driver.read(3, 1024) == (S_OK, CONTENT[1536:2560])
    assert driver.written == 1025


def test_sectors_are_written(driver: BlkDriver, image: Path) -> None:
    assert driver.request(1, 5, out=[b"a" * 512, b"b" * 1024]) == S_OK
    assert driver.written == 1
    assert image.read_bytes()[2560:4096] == b"a" * 512 + b"b" * 1024


def test_the_id_is_padded_with_nul(driver: BlkDriver) -> None:
    data = bytearray(b"\xaa" * 20)
    assert driver.request(8, into=[data]) == S_OK
    assert data == b"SN-1".ljust(20, b"\0") and driver.written == 21
    short, split = bytearray(3), bytearray(30)
    assert driver.request(8, into=[short, split]) == S_OK
    assert short + split[:17] == data and driver.written == 20


def test_flush_discard_and_zeroes(driver: BlkDriver, device: Blk) -> None:
    assert driver.flush() == S_OK
    assert driver.ranges(13, (8, 8, 1)) == S_OK
    assert driver.read(7, 512 * 10)[1] == CONTENT[3584:4096] + bytes(4096) + CONTENT[8192:8704]
    assert driver.ranges(11, (16, 8, 0), (32, 16, 0), (40, 0, 0)) == S_OK
    if device.disk.can_discard:
        assert driver.read(32, 4096) == (S_OK, bytes(4096))


def test_any_framing_is_the_same_request(driver: BlkDriver) -> None:
    head = header(0, 2)
    data = bytearray(513)  # the status is the last byte of the data's descriptor
    driver.send([head[:1], head[1:9], head[9:]], [data])
    assert data == CONTENT[1024:1536] + b"\0" and driver.written == 513
    payload = b"w" * 512
    status = bytearray(1)
    driver.send([header(1, 4) + payload[:100], payload[100:]], [status])
    assert status == b"\0" and driver.read(4, 512) == (S_OK, payload)


def test_nothing_is_read_or_written_with_no_data(driver: BlkDriver) -> None:
    assert driver.request(0, 0) == S_OK
    assert driver.request(1, SECTORS) == S_OK


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type", "sector", "length"),
    [
        (0, SECTORS, 512),
        (0, SECTORS - 1, 1024),
        (0, 2**64 - 1, 512),
        (0, 2**55, 512),  # times 512 it wraps to 0 in 64 bits
        (0, 2**55 - 1, 1024),
        (1, SECTORS, 512),
        (1, 2**64 - 1, 1024),
        (0, 0, 511),
        (1, 0, 513),
    ],
)
def test_a_transfer_that_is_not_on_the_disk_is_an_error(
    driver: BlkDriver, image: Path, type: int, sector: int, length: int
) -> None:
    data = bytearray(b"\xaa" * length)
    status = driver.request(type, sector, **{"into" if type == 0 else "out": [data]})
    assert status == S_IOERR and driver.errors == 1
    assert data == b"\xaa" * length and image.read_bytes() == CONTENT
    assert driver.written == (type == 1)  # the status comes after data that was not written


@pytest.mark.parametrize(
    ("type", "segments", "status"),
    [
        (11, [(0, 8, 1)], S_UNSUPP),
        (11, [(0, 8, 2)], S_UNSUPP),
        (13, [(0, 8, 2)], S_UNSUPP),
        (13, [(0, 8, 1 << 31)], S_UNSUPP),
        (11, [(SECTORS, 1, 0)], S_IOERR),
        (11, [(SECTORS - 1, 2, 0)], S_IOERR),
        (11, [(2**64 - 1, 1, 0)], S_IOERR),
        (11, [(2**64 - 1, 2**32 - 1, 0)], S_IOERR),
        (13, [(2**64 - 8, 8, 0)], S_IOERR),
        (11, [], S_IOERR),
        (11, [(0, 1, 0)] * (blk.MAX_DISCARD_SEGMENTS + 1), S_IOERR),
        (13, [(0, 1, 0)] * (blk.MAX_ZEROES_SEGMENTS + 1), S_IOERR),
        # the first is right, the last is not: nothing is done
        (11, [(0, 64, 0), (0, SECTORS + 1, 0)], S_IOERR),
    ],
)
def test_ranges_are_checked_before_anything_is_done(
    driver: BlkDriver,
    image: Path,
    type: int,
    segments: list[tuple[int, int, int]],
    status: int,
) -> None:
    assert driver.ranges(type, *segments) == status
    assert image.read_bytes() == CONTENT


def test_a_range_has_a_longest(tmp_path: Path) -> None:
    path = tmp_path / "large.img"
    with path.open("xb") as file:
        file.truncate(4 << 30)
    with open_raw(path) as disk:
        driver = BlkDriver(Blk(disk))
        assert driver.ranges(13, (0, blk.MAX_ZEROES_SECTORS, 1)) == S_OK
        assert driver.ranges(13, (0, blk.MAX_ZEROES_SECTORS + 1, 1)) == S_IOERR
        assert driver.ranges(11, (0, blk.MAX_DISCARD_SECTORS, 0)) == S_OK
        assert driver.ranges(11, (0, blk.MAX_DISCARD_SECTORS + 1, 0)) == S_IOERR


def test_half_a_segment_is_an_error(driver: BlkDriver) -> None:
    assert driver.request(11, out=[bytes(24)]) == S_IOERR


@pytest.mark.parametrize("type", [2, 3, 5, 7, 10, 14, 15, 16, 26, 0x80000000, 2**32 - 1])
def test_an_unknown_type_is_unsupported(driver: BlkDriver, type: int) -> None:
    assert driver.request(type, out=[b"x" * 512]) == S_UNSUPP
    assert driver.request(type, into=[bytearray(512)]) == S_UNSUPP


def test_a_request_without_a_header_is_an_error(driver: BlkDriver) -> None:
    for readable in ([], [header(0)[:15]]):
        status = bytearray(b"\xee")
        driver.send(readable, [status])
        assert status[0] == S_IOERR and driver.written == 1


def test_a_request_without_a_status_byte_breaks_the_device(driver: BlkDriver) -> None:
    with pytest.raises(GuestError, match="status"):
        driver.send([header(1), bytes(512)], [])


def test_a_transfer_has_a_longest() -> None:
    request = req.Request(0, 0, [], req.MAX_TRANSFER, memoryview(b""))
    assert req.check_transfer(request, 1 << 40, 512) == 0
    request.length += 512
    with pytest.raises(req.Refused):
        req.check_transfer(request, 1 << 40, 512)
    assert blk.SIZE_MAX * blk.SEG_MAX <= req.MAX_TRANSFER


def test_a_transfer_is_in_whole_blocks_of_the_disk(driver: BlkDriver, device: Blk) -> None:
    device.disk.limits.logical = 4096
    assert driver.read(8, 4096)[0] == S_OK
    assert driver.read(1, 4096)[0] == S_IOERR
    assert driver.read(8, 512)[0] == S_IOERR


def test_a_read_only_disk_is_not_written(image: Path) -> None:
    with open_raw(image, readonly=True) as disk:
        device = Blk(disk)
        driver = BlkDriver(device)
        assert device.has(blk.F_RO)
        assert not device.has(blk.F_DISCARD) and not device.has(blk.F_WRITE_ZEROES)
        assert driver.write(0, b"x" * 512) == S_IOERR
        assert driver.ranges(11, (0, 8, 0)) == S_UNSUPP
        assert driver.ranges(13, (0, 8, 0)) == S_UNSUPP
        assert driver.flush() == S_OK
        assert driver.read(1, 512) == (S_OK, CONTENT[512:1024])
    assert image.read_bytes() == CONTENT


def test_what_was_not_negotiated_is_not_done(device: Blk) -> None:
    driver = BlkDriver(device, features=0)
    assert driver.ranges(11, (0, 8, 0)) == S_UNSUPP
    assert driver.ranges(13, (0, 8, 0)) == S_UNSUPP


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_request_does_anything_but_answer(data: st.DataObject) -> None:
    """Whatever is sent: a status, no exception, no byte outside what it may touch."""
    fd = os.memfd_create("disk")
    os.write(fd, CONTENT)
    path = f"/proc/self/fd/{fd}"
    types = st.sampled_from([0, 1, 4, 8, 11, 13, 99])
    numbers = st.one_of(
        st.integers(0, SECTORS), st.integers(0, 2**64 - 1), st.sampled_from([2**55, 2**64 - 1])
    )
    head = struct.pack("<IIQ", data.draw(types), 0, data.draw(numbers))
    segment = st.builds(
        lambda sector, count, flags: struct.pack("<QII", sector, count, flags),
        numbers,
        st.one_of(st.integers(0, 16), st.integers(0, 2**32 - 1)),
        st.integers(0, 3),
    )
    body = data.draw(
        st.one_of(st.lists(segment, max_size=3).map(b"".join), st.binary(max_size=1100))
    )
    whole = head + body if data.draw(st.booleans()) else data.draw(st.binary(max_size=40))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=4)))
    readable = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    sizes = data.draw(
        st.lists(st.sampled_from([1, 2, 20, 511, 512, 513, 1024]), min_size=1, max_size=4)
    )
    writable = [bytearray(b"\xee" * size) for size in sizes]
    with open_raw(path) as disk:
        driver = BlkDriver(Blk(disk))
        driver.send(readable, writable)
        assert writable[-1][-1] in (S_OK, S_IOERR, S_UNSUPP)
        assert 0 <= driver.written <= sum(sizes)
        joined = b"".join(writable)
        if whole[:4] != bytes(4) and whole[:4] != b"\x08\0\0\0":
            assert joined[:-1] == b"\xee" * (sum(sizes) - 1)
        assert os.fstat(fd).st_size == len(CONTENT)
    os.close(fd)


# ---- configuration -----------------------------------------------------------------------------


def test_the_configuration_is_laid_out_as_the_specification_has_it(image: Path) -> None:
    with open_raw(image) as disk:
        device = Blk(disk, queues=4)
        config = device.config_read(0, 60)
        disk.limits.physical, disk.limits.min_io, disk.limits.opt_io = 4096, 8192, 1 << 20
        disk.limits.alignment = 1024
        config = device.config_read(0, 60)
        assert len(config) == 60
        assert struct.unpack_from("<QII", config) == (SECTORS, blk.SIZE_MAX, blk.SEG_MAX)
        assert struct.unpack_from("<IBBHI", config, 20) == (512, 3, 2, 16, 2048)
        assert config[32] == 1
        assert struct.unpack_from("<H", config, 34) == (4,)
        assert struct.unpack_from("<III", config, 36) == (1 << 21, 32, 8)
        assert struct.unpack_from("<IIB", config, 48) == (1 << 17, 1, 1)
        assert device.config_read(58, 8) == bytes(2)
        assert device.has(blk.F_MQ) is False  # nothing negotiated yet
        assert device.device_features >> blk.F_MQ & 1
        assert device.queue_max_sizes == (256,) * 4


def test_the_driver_chooses_the_cache_mode(device: Blk, driver: BlkDriver) -> None:
    assert device.disk.write_back
    device.config_write(32, b"\0")
    assert not device.disk.write_back and device.config_read(32, 1) == b"\0"
    device.config_write(0, b"\0")  # the capacity is not its to write
    assert device.config_read(0, 2) == struct.pack("<H", SECTORS)
    device.reset()
    assert device.disk.write_back


def test_without_flushes_every_write_is_stable(device: Blk) -> None:
    """Virtio 1.2, 5.2.6.2: neither FLUSH nor CONFIG_WCE negotiated."""
    device.status = 8  # FEATURES_OK: the driver may look already
    assert device.config_read(32, 1) == b"\0"
    BlkDriver(device, features=0)
    assert not device.disk.write_back
    device.config_write(32, b"\1")
    assert not device.disk.write_back


def test_a_larger_image_is_told_to_the_driver(device: Blk, driver: BlkDriver, image: Path) -> None:
    told = []
    device.config_changed = lambda: told.append(1)  # type: ignore[method-assign]
    assert not device.refresh() and not told
    os.truncate(image, 2 * len(CONTENT))
    assert device.refresh() and told == [1]
    assert driver.read(2 * SECTORS - 1, 512) == (S_OK, bytes(512))


def test_state_comes_back(image: Path, tmp_path: Path) -> None:
    with open_raw(image) as disk:
        device = Blk(disk)
        driver = BlkDriver(device)
        driver.write(0, b"v" * 512)
        device.config_write(32, b"\0")
        disk.failed = OSError(errno.EIO, "gone")
        state = json.loads(json.dumps(device.device_state()))
    with open_raw(image) as disk:
        device = Blk(disk)
        device.restore_device(state)
        assert not disk.write_back
        assert BlkDriver(device).flush() == S_IOERR
    other = tmp_path / "other"
    other.write_bytes(bytes(512))
    with open_raw(other) as disk, pytest.raises(ValueError, match="256 sectors"):
        Blk(disk).restore_device(state)


def test_what_was_written_to_an_overlay_is_part_of_the_state(image: Path) -> None:
    with OverlayDisk(open_raw(image)) as disk:
        device = Blk(disk)
        disk.write([memoryview(b"v" * 700)], 300)
        disk.discard(8192, 4096)
        state = json.loads(json.dumps(device.device_state()))
        before = contents(disk)
        disk.write([memoryview(b"w" * 9000)], 100)
        for _ in range(2):
            device.restore_device(state)
            assert contents(disk) == before
        assert disk.written == 2 * 4096
        for key in ("present", "blocks"):
            bad = {**state, "overlay": {**state["overlay"], key: "AAAA"}}
            with pytest.raises(ValueError, match="overlay"):
                device.restore_device(bad)
        device.restore_device(state)
        assert contents(disk) == before
    assert image.read_bytes() == CONTENT
    with open_raw(image) as plain, pytest.raises(ValueError, match="has none"):
        Blk(plain).restore_device(state)


def contents(disk: Disk) -> bytes:
    data = bytearray(len(CONTENT))
    disk.read([memoryview(data)], 0)
    return bytes(data)


# ---- failing hosts: more of them in test_disk_faults.py -----------------------------------------


def test_an_error_of_the_host_is_the_requests_alone(
    device: Blk, driver: BlkDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise OSError(errno.EIO, "no")

    with monkeypatch.context() as patch:
        patch.setattr(RawDisk, "read", fails)
        assert driver.read(0, 512)[0] == S_IOERR
        assert driver.errors == 1
    assert driver.read(0, 512) == (S_OK, CONTENT[:512])


def test_chains_are_what_they_say() -> None:
    chain = FakeChain([b"ab", b""], [bytearray(3)])
    assert (chain.read_bytes, chain.write_bytes, len(chain.readable)) == (2, 3, 1)
