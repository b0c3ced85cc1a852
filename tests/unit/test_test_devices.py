"""The devices that guests made for QEMU's test set-up expect."""

from __future__ import annotations

import json

import pytest

from pykvm import result as reasons
from pykvm.devices import debug_exit, testdev
from pykvm.devices.fw_cfg import FwCfg
from pykvm.devices.pvpanic import Pvpanic
from pykvm.result import DEBUG_EXIT
from tests.support.ports import Ports


@pytest.mark.parametrize(("size", "value"), [(1, 0x7F), (2, 0x1234), (4, 0xDEADBEEF)])
def test_debug_exit_ends_the_run_with_the_written_value(
    ports: Ports, size: int, value: int
) -> None:
    debug_exit.DebugExit().attach(ports.pio, 0xF4)
    ports.out(0xF4, value, size)
    assert ports.end is not None
    assert (ports.end.reason, ports.end.code) == (DEBUG_EXIT, value)


def test_debug_exit_reads_zero(ports: Ports) -> None:
    debug_exit.DebugExit().attach(ports.pio, 0xF4)
    assert (ports.inp(0xF4, 4), ports.reason) == (0, reasons.HALTED)


@pytest.mark.parametrize(
    ("code", "status"), [(0, 1), (1, 3), (0x31, 0x63), (0x80, 1), (0x1FF, 255)]
)
def test_qemus_exit_status_is_odd(code: int, status: int) -> None:
    assert debug_exit.qemu_status(code) == status


@pytest.fixture
def lines(ports: Ports) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    testdev.TestDevice(
        lambda gsi, level: seen.append((gsi, level)), lambda gpa: seen.append((gpa, -1))
    ).attach_all(ports.pio, ports.mmio)
    return seen


def test_the_test_devices_ports_read_back_what_was_written(
    ports: Ports, lines: list[tuple[int, int]]
) -> None:
    ports.out(0xE0, 0x12345678, 4)
    assert ports.inp(0xE0, 4) == ports.inp(0xE8, 4) == 0x12345678
    ports.out(0xE1, 0xAA)
    ports.out(0xE2, 0xBBCC, 2)
    assert ports.inp(0xE0, 4) == 0xBBCCAA78
    assert (ports.inp(0xE0), ports.inp(0xE2, 2), ports.inp(0xE9)) == (0x78, 0xBBCC, 0xAA)


def test_the_test_device_drives_lines_and_flushes_pages(
    ports: Ports, lines: list[tuple[int, int]]
) -> None:
    ports.out(0x2000, 1)
    ports.out(0x2017, 0xFF)
    ports.out(0x2000, 0)
    ports.out(0xE4, 0x123456, 4)
    assert lines == [(0, 1), (23, 1), (0, 0), (0x123000, -1)]
    ports.inp(0xE4, 4)
    assert len(lines) == 4


def test_the_test_devices_memory_holds_every_width(
    ports: Ports, lines: list[tuple[int, int]]
) -> None:
    ports.store(0xFF000000, 0x1122334455667788, 8)
    ports.store(0xFF000003, 0xAA, 1)
    assert ports.load(0xFF000000, 8) == 0x11223344AA667788
    assert ports.load(0xFF000001, 2) == 0x6677
    ports.store(0xFF00FFFE, 0x55667788, 4)  # the last two bytes, and two beyond
    assert ports.load(0xFF00FFFE, 2) == 0x7788
    assert ports.load(0xFF00FFFE, 4) == 0x7788


def test_the_test_devices_state_is_its_memory() -> None:
    one, two = testdev.TestDevice(), testdev.TestDevice()
    ports, other = Ports(), Ports()
    one.attach_all(ports.pio, ports.mmio)
    two.attach_all(other.pio, other.mmio)
    ports.out(0xE0, 0x01020304, 4)
    ports.store(0xFF000100, 0xCAFE, 2)
    two.restore(json.loads(json.dumps(one.state())))
    assert (other.inp(0xE0, 4), other.load(0xFF000100, 2)) == (0x01020304, 0xCAFE)
    one.close()
    assert (len(ports.pio), len(ports.mmio)) == (0, 0)


def test_fw_cfg_tells_processors_and_memory(ports: Ports) -> None:
    FwCfg(cpus=4, memory=5 << 30, max_cpus=16, extra={0x19: b"\0\0\0\0"}).attach(ports.pio, 0x510)

    def item(key: int, size: int) -> bytes:
        ports.out(0x510, key, 2)
        return bytes(ports.inp(0x511) for _ in range(size))

    assert item(0x00, 6) == b"QEMU\0\0"
    assert item(0x01, 4) == bytes([1, 0, 0, 0])
    assert item(0x03, 8) == (5 << 30).to_bytes(8, "little")
    assert (item(0x05, 2), item(0x0F, 2)) == (b"\4\0", b"\x10\0")
    assert item(0x77, 3) == b"\0\0\0"
    ports.out(0x510, 0x00, 2)
    ports.out(0x511, 0x55)  # data is for reading
    ports.out(0x510, 0x55)  # and the selector for 16 bits
    assert ports.inp(0x511, 4) == int.from_bytes(b"QEMU", "little")


def test_pvpanic_tells_panics_by_their_kind(ports: Ports) -> None:
    seen: list[str] = []
    Pvpanic(seen.append).attach(ports.pio, 0x505)
    assert ports.inp(0x505) == 0x03
    for value in (0x00, 0x01, 0x02, 0xFC):
        ports.out(0x505, value)
    assert seen == ["panicked", "crash-loaded"]
