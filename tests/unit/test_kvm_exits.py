"""Exits decoded from run pages laid out by hand, as linux/kvm.h lays them out."""

from __future__ import annotations

import errno
from struct import pack
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pykvm._abi import ffi, lib
from pykvm.errors import KvmError
from pykvm.kvm import exits
from tests.support.fake_ioctl import fake_vcpu

UNION = 32  # offset of the exit's part in struct kvm_run
DATA = 4096  # where KVM puts port I/O


def page(reason: int, union: bytes, data: bytes = b"") -> Any:
    """A run page; what is returned keeps its memory."""
    raw = bytearray(8192)
    raw[8:12] = pack("<I", reason)
    raw[UNION : UNION + len(union)] = union
    raw[DATA : DATA + len(data)] = data
    return ffi.from_buffer("struct kvm_run *", raw)


def io(direction: int, size: int, port: int, count: int, offset: int = DATA) -> bytes:
    return pack("<BBHIQ", direction, size, port, count, offset)


IO, MMIO = lib.KVM_EXIT_IO, lib.KVM_EXIT_MMIO

DECODED: list[tuple[int, bytes, exits.Exit]] = [
    (IO, io(0, 2, 0x1F0, 512), exits.IoExit(0x1F0, 2, 512, False, b"")),
    (MMIO, pack("<Q8sIB", 0xFEC0_0000, b"", 4, 0), exits.MmioExit(0xFEC0_0000, 4, False, b"")),
    (lib.KVM_EXIT_HLT, b"", exits.HltExit()),
    (lib.KVM_EXIT_SHUTDOWN, b"", exits.ShutdownExit()),
    (lib.KVM_EXIT_IRQ_WINDOW_OPEN, b"", exits.IrqWindowOpenExit()),
    (lib.KVM_EXIT_INTR, b"", exits.IntrExit()),
    (lib.KVM_EXIT_SET_TPR, b"", exits.SetTprExit()),
    (lib.KVM_EXIT_NMI, b"", exits.NmiExit()),
    (lib.KVM_EXIT_DIRTY_RING_FULL, b"", exits.DirtyRingFullExit()),
    (lib.KVM_EXIT_X86_BUS_LOCK, b"", exits.BusLockExit()),
    (lib.KVM_EXIT_AP_RESET_HOLD, b"", exits.ApResetHoldExit()),
    (lib.KVM_EXIT_EXCEPTION, pack("<II", 14, 2), exits.ExceptionExit(14, 2)),
    (
        lib.KVM_EXIT_FAIL_ENTRY,
        pack("<QI", 0x8000_0021, 3),
        exits.FailEntryExit(0x8000_0021, 3),
    ),
    (
        lib.KVM_EXIT_INTERNAL_ERROR,
        pack("<II3Q", lib.KVM_INTERNAL_ERROR_DELIVERY_EV, 3, 7, 8, 9),
        exits.InternalErrorExit(lib.KVM_INTERNAL_ERROR_DELIVERY_EV, (7, 8, 9)),
    ),
    (
        lib.KVM_EXIT_X86_RDMSR,
        pack("<B7xIIQ", 0, 2, 0x4B56_4D00, 99),
        exits.RdmsrExit(0x4B56_4D00, 0, lib.KVM_MSR_EXIT_REASON_UNKNOWN),
    ),
    (
        lib.KVM_EXIT_X86_WRMSR,
        pack("<B7xIIQ", 0, 4, 0xC000_0080, 0x501),
        exits.WrmsrExit(0xC000_0080, 0x501, lib.KVM_MSR_EXIT_REASON_FILTER),
    ),
    (
        lib.KVM_EXIT_HYPERCALL,
        pack("<Q6QQI", 12, 1, 2, 3, 4, 5, 6, 0, 1),
        exits.HypercallExit(12, (1, 2, 3, 4, 5, 6), 1),
    ),
    (
        lib.KVM_EXIT_DEBUG,
        pack("<IIQQQ", 1, 0, 0x1002, 0xFFFF_4FF0, 0x400),
        exits.DebugExit(1, 0x1002, 0xFFFF_4FF0, 0x400),
    ),
    (
        lib.KVM_EXIT_SYSTEM_EVENT,
        pack("<II2Q", lib.KVM_SYSTEM_EVENT_CRASH, 2, 5, 6),
        exits.SystemEventExit(lib.KVM_SYSTEM_EVENT_CRASH, (5, 6)),
    ),
    (lib.KVM_EXIT_IOAPIC_EOI, pack("<B", 0x31), exits.IoapicEoiExit(0x31)),
    (
        lib.KVM_EXIT_HYPERV,
        pack("<II4Q", lib.KVM_EXIT_HYPERV_HCALL, 0, 1, 2, 3, 4),
        exits.HypervExit(lib.KVM_EXIT_HYPERV_HCALL, {"input": 1, "result": 2, "params": (3, 4)}),
    ),
    (
        lib.KVM_EXIT_HYPERV,
        pack("<IIIIQQQ", lib.KVM_EXIT_HYPERV_SYNIC, 0, 0x4000_0080, 0, 1, 2, 3),
        exits.HypervExit(
            lib.KVM_EXIT_HYPERV_SYNIC,
            {"msr": 0x4000_0080, "control": 1, "evt_page": 2, "msg_page": 3},
        ),
    ),
    (lib.KVM_EXIT_TPR_ACCESS, pack("<QI", 0x8000, 1), exits.TprAccessExit(0x8000, True)),
    (lib.KVM_EXIT_NOTIFY, pack("<I", 1), exits.NotifyExit(lib.KVM_NOTIFY_CONTEXT_INVALID)),
    (
        lib.KVM_EXIT_MEMORY_FAULT,
        pack("<QQQ", 8, 0x20_0000, 4096),
        exits.MemoryFaultExit(lib.KVM_MEMORY_EXIT_FLAG_PRIVATE, 0x20_0000, 4096),
    ),
]


@pytest.mark.parametrize(
    ("reason", "union", "expected"), DECODED, ids=[type(e).__name__ for _, _, e in DECODED]
)
def test_each_exit_says_what_its_part_of_the_run_page_holds(
    reason: int, union: bytes, expected: exits.Exit
) -> None:
    decoded = exits.decode(page(reason, union))
    assert decoded == expected
    assert (decoded.reason, decoded.name) == (reason, type(decoded).name)
    assert getattr(lib, decoded.name) == reason
    assert hash(decoded) == hash(expected)
    assert repr(decoded).startswith(f"{type(decoded).__name__}(")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_string_instruction_is_one_exit_with_its_items_in_order(size: int) -> None:
    values = [0x41, 0x42, 0x43]
    data = b"".join(value.to_bytes(size, "little") for value in values)
    exit = exits.decode(page(IO, io(1, size, 0xE9, 3), data + b"\xff" * 8))
    assert isinstance(exit, exits.IoExit)
    assert (exit.count, exit.size, exit.data) == (3, size, data)
    assert exit.items == values
    with pytest.raises(ValueError, match="3 items"):
        _ = exit.value


def test_the_data_of_port_io_lies_where_the_run_page_says() -> None:
    run = page(IO, io(1, 4, 0x510, 1, offset=DATA + 64))
    ffi.cast("uint32_t *", ffi.cast("char *", run) + DATA + 64)[0] = 0xDEAD_BEEF
    exit = exits.decode(run)
    assert isinstance(exit, exits.IoExit)
    assert exit.value == 0xDEAD_BEEF
    assert exit.items == [0xDEAD_BEEF]


@pytest.mark.parametrize("length", range(1, 9))
def test_mmio_writes_have_any_length_up_to_eight(length: int) -> None:
    union = pack("<Q8sIB", 0xD000_0000, bytes(range(1, 9)), length, 1)
    exit = exits.decode(page(MMIO, union))
    assert exit == exits.MmioExit(0xD000_0000, length, True, bytes(range(1, length + 1)))
    assert isinstance(exit, exits.MmioExit)
    assert exit.value == int.from_bytes(bytes(range(1, length + 1)), "little")


def test_an_exit_that_is_kept_stays_what_it_was() -> None:
    raw = bytearray(8192)
    raw[8:12] = pack("<I", IO)
    raw[UNION : UNION + 16] = io(1, 1, 0xE9, 2)
    raw[DATA : DATA + 2] = b"hi"
    run = ffi.from_buffer("struct kvm_run *", raw)
    kept = exits.decode(run)
    before = repr(kept)
    raw[:] = b"\xff" * len(raw)
    assert repr(kept) == before
    assert kept == exits.IoExit(0xE9, 1, 2, True, b"hi")


def test_an_emulation_failure_brings_the_instruction_that_failed() -> None:
    code = bytes.fromhex("0fc70f") + bytes(12)
    union = pack("<IIQB15s", lib.KVM_INTERNAL_ERROR_EMULATION, 3, 1, 3, code)
    exit = exits.decode(page(lib.KVM_EXIT_INTERNAL_ERROR, union))
    assert isinstance(exit, exits.InternalErrorExit)
    assert (exit.suberror, exit.flags, exit.insn_bytes) == (1, 1, bytes.fromhex("0fc70f"))
    assert len(exit.data) == 3


@pytest.mark.parametrize("ndata", [0, 1, 2])
def test_an_emulation_failure_without_the_instruction_has_no_bytes(ndata: int) -> None:
    union = pack("<IIQB15s", lib.KVM_INTERNAL_ERROR_EMULATION, ndata, 1, 3, b"\x0f" * 15)
    exit = exits.decode(page(lib.KVM_EXIT_INTERNAL_ERROR, union))
    assert isinstance(exit, exits.InternalErrorExit)
    assert exit.insn_bytes == b""
    assert len(exit.data) == ndata


def test_flags_that_do_not_announce_the_instruction_are_believed() -> None:
    union = pack("<IIQB15s", lib.KVM_INTERNAL_ERROR_EMULATION, 3, 2, 3, b"\x0f" * 15)
    exit = exits.decode(page(lib.KVM_EXIT_INTERNAL_ERROR, union))
    assert isinstance(exit, exits.InternalErrorExit)
    assert (exit.flags, exit.insn_bytes) == (2, b"")


@pytest.mark.parametrize("reason", [lib.KVM_EXIT_INTERNAL_ERROR, lib.KVM_EXIT_SYSTEM_EVENT])
def test_more_details_than_there_is_room_for_are_cut(reason: int) -> None:
    exit = exits.decode(page(reason, pack("<II", 2, 1000) + bytes(range(128))))
    assert isinstance(exit, exits.InternalErrorExit | exits.SystemEventExit)
    assert len(exit.data) == 16
    assert exit.data[15] == int.from_bytes(bytes(range(120, 128)), "little")


def test_an_unknown_exit_is_preserved_with_its_bytes() -> None:
    union = bytes(range(256))
    exit = exits.decode(page(999, union))
    assert isinstance(exit, exits.UnknownExit)
    assert (exit.reason, exit.name, exit.data) == (999, "", union)
    assert "999" in repr(exit)
    hardware = exits.decode(page(lib.KVM_EXIT_UNKNOWN, pack("<Q", 0x41)))
    assert isinstance(hardware, exits.UnknownExit)
    assert hardware.name == "KVM_EXIT_UNKNOWN"
    assert hardware.hardware_exit_reason == 0x41
    other = exits.decode(page(lib.KVM_EXIT_OSI, b""))
    assert other.name == "KVM_EXIT_OSI"  # not of x86, but the header names it


def test_an_unknown_kind_of_hyperv_exit_is_preserved_as_well() -> None:
    exit = exits.decode(page(lib.KVM_EXIT_HYPERV, pack("<IIQ", 77, 0, 5)))
    assert isinstance(exit, exits.UnknownExit)
    assert exit.name == "KVM_EXIT_HYPERV"
    assert exit.data[:16] == pack("<IIQ", 77, 0, 5)


@given(
    reason=st.integers(0, 64) | st.integers(0, 0xFFFF_FFFF),
    union=st.binary(max_size=256),
)
@example(reason=MMIO, union=pack("<QQIB", 0, 0, 0x90817DF8, 1))
def test_no_run_page_makes_decoding_fail(reason: int, union: bytes) -> None:
    if reason == IO:
        # KVM keeps its data inside the run page; what lies elsewhere is not ours to read.
        direction, size = union.ljust(2, b"\0")[:2]
        union = io(direction, size, 0, 4)
    decoded = exits.decode(page(reason, union))
    assert decoded.reason == reason
    assert repr(decoded)
    assert decoded == exits.decode(page(reason, union))


def test_exits_of_different_kinds_are_not_equal() -> None:
    assert exits.HltExit() != exits.ShutdownExit()
    assert exits.RdmsrExit(1, 0, 2) != exits.WrmsrExit(1, 0, 2)
    assert exits.HltExit() != "hlt"


def test_exits_can_be_matched_by_place() -> None:
    match exits.IoExit(0xE9, 1, 1, True, b"A"):
        case exits.IoExit(0xE9, size, _, True, data):
            assert (size, data) == (1, b"A")
        case _:
            pytest.fail("no match")


# -- what Vcpu.run() makes of KVM_RUN's errno ----------------------------------------------------


def test_a_signal_is_an_exit() -> None:
    with fake_vcpu() as (kernel, _, _, vcpu):
        kernel.answers["KVM_RUN"] = -errno.EINTR
        assert vcpu.run() == exits.IntrExit()
        assert len(kernel.named("KVM_RUN")) == 1  # and is not retried


@pytest.mark.parametrize("error", [errno.EFAULT, 133])
def test_a_memory_fault_comes_with_an_errno_and_is_an_exit(error: int) -> None:
    with fake_vcpu() as (kernel, _, _, vcpu):

        def fault(arg: Any) -> int:
            run = vcpu.kvm_run
            run.exit_reason = lib.KVM_EXIT_MEMORY_FAULT
            ffi.buffer(run.padding)[:24] = pack("<QQQ", 0, 0x5000, 4096)
            return -error

        kernel.answers["KVM_RUN"] = fault
        assert vcpu.run() == exits.MemoryFaultExit(0, 0x5000, 4096, error)


def test_efault_without_an_explanation_is_an_error() -> None:
    with fake_vcpu() as (kernel, _, _, vcpu):
        kernel.answers["KVM_RUN"] = -errno.EFAULT
        with pytest.raises(KvmError, match="guest memory is not there"):
            vcpu.run()


# -- answering ------------------------------------------------------------------------------------


def test_port_reads_are_answered_with_all_their_items() -> None:
    with fake_vcpu() as (_, _, _, vcpu):
        run = vcpu.kvm_run
        run.exit_reason = IO
        run.io.size, run.io.count, run.io.data_offset = 2, 3, DATA
        vcpu.complete_io(b"abcdef")
        assert ffi.unpack(ffi.cast("char *", run) + DATA, 6) == b"abcdef"
        with pytest.raises(ValueError, match="6 bytes"):
            vcpu.complete_io(b"abcd")
        run.io.count = 1
        vcpu.complete_io(0x1234)
        assert ffi.unpack(ffi.cast("char *", run) + DATA, 2) == b"\x34\x12"
        with pytest.raises(OverflowError):
            vcpu.complete_io(0x1_0000)


@pytest.mark.parametrize("length", range(1, 9))
def test_mmio_reads_are_answered_at_their_length(length: int) -> None:
    with fake_vcpu() as (_, _, _, vcpu):
        mmio = vcpu.kvm_run.mmio
        mmio.len = length
        vcpu.complete_mmio(bytes(range(length)))
        assert bytes(ffi.buffer(mmio.data, length)) == bytes(range(length))
        vcpu.complete_mmio((1 << 8 * length) - 1)
        assert bytes(ffi.buffer(mmio.data, length)) == b"\xff" * length
        with pytest.raises(ValueError, match=f"{length} bytes"):
            vcpu.complete_mmio(bytes(length + 1))


def test_msr_exits_and_hypercalls_are_answered() -> None:
    with fake_vcpu() as (_, _, _, vcpu):
        run = vcpu.kvm_run
        vcpu.complete_msr(0x1_0000_0001)
        assert (run.msr.data, run.msr.error) == (0x1_0000_0001, 0)
        vcpu.complete_msr(error=1)
        assert run.msr.error == 1
        vcpu.complete_hypercall(5)
        assert run.hypercall.ret == 5


def test_immediate_exit_is_a_byte_of_the_run_page() -> None:
    with fake_vcpu() as (_, _, _, vcpu):
        assert vcpu.immediate_exit == 0
        vcpu.immediate_exit = 1
        assert vcpu.kvm_run.immediate_exit == 1
