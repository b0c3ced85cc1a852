"""Ioctls whose answer has no fixed size: asking again when it did not fit, and partial answers."""

from __future__ import annotations

import errno
from struct import pack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm import kvm as k
from pykvm._abi import ffi
from pykvm.errors import KvmError
from tests.support.fake_ioctl import FakeKernel, fake_vcpu


def cpuid_answer(total: int, says_how_many: bool = True) -> Any:
    """KVM_GET_*CPUID*: nothing is said with E2BIG, and by older kernels nothing on success."""

    def answer(arg: Any) -> int:
        if arg.nent < total:
            return -errno.E2BIG
        if any(any(arg.entries[i].padding) for i in range(arg.nent)):
            return -errno.EINVAL  # as KVM_GET_EMULATED_CPUID has it
        if says_how_many:
            arg.nent = total
        for i in range(total):
            arg.entries[i] = ffi.new("struct kvm_cpuid_entry2 *", {"function": i, "edx": i * 3})[0]
        return 0

    return answer


@pytest.mark.parametrize("total", [0, 1, 40, 128, 129, 700])
@pytest.mark.parametrize("says_how_many", [True, False])
def test_cpuid_is_asked_for_until_it_fits(total: int, says_how_many: bool) -> None:
    with fake_vcpu() as (kernel, kvm, _, vcpu):
        for name in ("KVM_GET_SUPPORTED_CPUID", "KVM_GET_CPUID2", "KVM_GET_EMULATED_CPUID"):
            kernel.answers[name] = cpuid_answer(total, says_how_many)
        for entries in (kvm.get_supported_cpuid(), vcpu.get_cpuid2(), kvm.get_emulated_cpuid()):
            assert [(entry.function, entry.edx) for entry in entries] == [
                (i, i * 3) for i in range(total)
            ]


def test_cpuid_entries_live_and_change_on_their_own() -> None:
    with fake_vcpu() as (kernel, kvm, _, vcpu):
        kernel.answers["KVM_GET_SUPPORTED_CPUID"] = cpuid_answer(3)
        entries = [entry for entry in kvm.get_supported_cpuid() if entry.function != 1]
        entries[1].eax = 0x1234
        vcpu.set_cpuid2(entries)
        data = kernel.last.data
        assert data is not None
        assert data[:8] == pack("<II", 2, 0)
        assert data[48:64] == pack("<IIII", 2, 0, 0, 0x1234)


def test_a_cpuid_that_never_fits_is_an_error() -> None:
    with fake_vcpu() as (kernel, kvm, _, _):
        kernel.answers["KVM_GET_SUPPORTED_CPUID"] = -errno.E2BIG
        with pytest.raises(KvmError, match="E2BIG"):
            kvm.get_supported_cpuid()
        assert 5 < len(kernel.calls) < 20


def msr_list(indices: list[int]) -> Any:
    def answer(arg: Any) -> int:
        room, arg.nmsrs = arg.nmsrs, len(indices)
        if room < len(indices):
            return -errno.E2BIG
        for i, index in enumerate(indices):
            arg.indices[i] = index
        return 0

    return answer


@given(indices=st.lists(st.integers(0, 0xFFFF_FFFF), max_size=300))
def test_msr_lists_come_whole(indices: list[int]) -> None:
    with fake_vcpu() as (kernel, kvm, _, _):
        kernel.answers["KVM_GET_MSR_INDEX_LIST"] = msr_list(indices)
        kernel.answers["KVM_GET_MSR_FEATURE_INDEX_LIST"] = msr_list(indices[::-1])
        assert kvm.get_msr_index_list() == indices
        assert kvm.get_msr_feature_index_list() == indices[::-1]


@given(ids=st.lists(st.integers(0, (1 << 64) - 1), max_size=20))
def test_register_lists_come_whole(ids: list[int]) -> None:
    def answer(arg: Any) -> int:
        room, arg.n = arg.n, len(ids)
        if room < len(ids):
            return -errno.E2BIG
        for i, id in enumerate(ids):
            arg.reg[i] = id
        return 0

    with fake_vcpu() as (kernel, _, _, vcpu):
        kernel.answers["KVM_GET_REG_LIST"] = answer
        assert vcpu.get_reg_list() == ids


def test_a_kernel_that_asks_for_nonsense_is_not_obeyed() -> None:
    def answer(arg: Any) -> int:
        arg.nmsrs = 0xFFFF_FFFF
        return -errno.E2BIG

    with fake_vcpu() as (kernel, kvm, _, _):
        kernel.answers["KVM_GET_MSR_INDEX_LIST"] = answer
        with pytest.raises(KvmError, match="E2BIG"):
            kvm.get_msr_index_list()


class Msrs:
    """MSRs of a processor: a prefix of each list is served, up to the first it does not have."""

    def __init__(self, kernel: FakeKernel, values: dict[int, int]) -> None:
        self.values = values
        kernel.answers |= {"KVM_GET_MSRS": self.get, "KVM_SET_MSRS": self.set}

    def get(self, arg: Any) -> int:
        if arg.nmsrs >= 256:
            return -errno.E2BIG
        for i in range(arg.nmsrs):
            entry = arg.entries[i]
            if entry.index not in self.values:
                return i
            entry.data = self.values[entry.index]
        return int(arg.nmsrs)

    def set(self, arg: Any) -> int:
        if arg.nmsrs >= 256:
            return -errno.E2BIG
        for i in range(arg.nmsrs):
            entry = arg.entries[i]
            if entry.index not in self.values:
                return i
            self.values[entry.index] = entry.data
        return int(arg.nmsrs)


@pytest.mark.parametrize("count", [0, 1, 255, 256, 700])
def test_any_number_of_msrs_is_read_and_written(count: int) -> None:
    with fake_vcpu() as (kernel, kvm, _, vcpu):
        values = {0xC000_0000 + i: i << 40 for i in range(count)}
        msrs = Msrs(kernel, dict(values))
        assert vcpu.get_msrs(values) == values
        assert kvm.get_msrs(reversed(values)) == values
        assert list(kvm.get_msrs(reversed(values))) == list(values)[::-1]
        vcpu.set_msrs(dict.fromkeys(values, 7))
        assert set(msrs.values.values()) <= {7}


@pytest.mark.parametrize("bad", [0, 3, 254, 255, 300])
def test_the_msr_that_failed_is_named(bad: int) -> None:
    with fake_vcpu() as (kernel, _, _, vcpu):
        Msrs(kernel, {i: 0 for i in range(400) if i != bad})
        with pytest.raises(k.MsrError, match=rf"MSR {bad:#x} cannot be read") as refused:
            vcpu.get_msrs(range(400))
        assert (refused.value.index, refused.value.done) == (bad, bad)
        assert refused.value.ioctl == "KVM_GET_MSRS"
        with pytest.raises(k.MsrError, match=rf"MSR {bad:#x} does not take 0x5") as refused:
            vcpu.set_msrs(dict.fromkeys(range(400), 5))
        assert (refused.value.index, refused.value.done) == (bad, bad)
        assert isinstance(refused.value, KvmError)


def nested_answer(size: int) -> Any:
    def answer(arg: Any) -> int:
        room, arg.size = arg.size, size
        if room < size:
            return -errno.E2BIG
        arg.format = 1
        ffi.buffer(ffi.cast("char *", arg), size)[size - 1 : size] = b"\x5a"
        return 0

    return answer


@pytest.mark.parametrize(("cap", "size"), [(4224, 128), (4224, 4224), (128, 8320), (1, 4224)])
def test_nested_state_is_as_long_as_it_says(cap: int, size: int) -> None:
    with fake_vcpu() as (kernel, _, _, vcpu):
        kernel.caps["KVM_CAP_NESTED_STATE"] = cap
        kernel.answers["KVM_GET_NESTED_STATE"] = nested_answer(size)
        state = vcpu.get_nested_state()
        assert state.size == size
        assert len(kernel.calls) == 1 + (cap < size)  # KVM says what it wants, once
        raw = bytes(ffi.buffer(ffi.cast("char *", state), state.size))
        assert raw[-1] == 0x5A
        seen = []

        def read(arg: Any) -> int:
            seen.append(bytes(ffi.buffer(ffi.cast("char *", arg), arg.size)))
            return 0

        kernel.answers["KVM_SET_NESTED_STATE"] = read
        vcpu.set_nested_state(state)
        vcpu.set_nested_state(raw)
        assert seen == [raw, raw]
        with pytest.raises(ValueError, match="nested state"):
            vcpu.set_nested_state(raw[:-1])


def test_xsave_is_as_long_as_kvm_reads_it() -> None:
    with fake_vcpu() as (kernel, _, _, vcpu):
        kernel.caps["KVM_CAP_XSAVE2"] = 11008  # with AMX tiles

        def fill(arg: Any) -> int:
            ffi.memmove(arg, bytes(range(256)) * 43, 11008)
            return 0

        kernel.answers["KVM_GET_XSAVE2"] = fill
        xsave = vcpu.get_xsave2()
        assert ffi.sizeof(xsave[0]) == 11008
        vcpu.set_xsave(xsave)
        assert kernel.last.data == bytes(range(256)) * 43
        kernel.calls.clear()
        with pytest.raises(ValueError, match="KVM reads 11008 bytes"):
            vcpu.set_xsave(ffi.new("struct kvm_xsave *"))
        assert kernel.calls == []
