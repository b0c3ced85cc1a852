"""What a refusal says: the errno in words, closed handles, a KVM that is not there."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from pykvm import kvm as k
from pykvm._abi import ffi, lib
from pykvm.errors import CapabilityError, ClosedError, KvmError
from pykvm.kvm import hints
from tests.support.fake_ioctl import fake_kernel, fake_vcpu


@pytest.mark.parametrize(
    ("method", "args", "code", "words"),
    [
        ("create_irqchip", (), errno.EEXIST, "already"),
        ("create_vcpu", (0,), errno.EEXIST, "already"),
        ("set_user_memory_region", (0, 0, 4096, 0), errno.EINVAL, "multiples of 4096"),
        ("irq_line", (0, 1), errno.ENXIO, r"create_irqchip\(\)"),
        ("get_clock", (), errno.EIO, "fork"),
        ("get_clock", (), errno.ENOTTY, "does not know this ioctl"),
    ],
)
def test_an_errno_is_explained_for_the_ioctl_that_returned_it(
    method: str, args: tuple[Any, ...], code: int, words: str
) -> None:
    with fake_vcpu() as (kernel, _, vm, _):
        name = f"KVM_{method.upper()}"
        kernel.answers[name] = -code
        with pytest.raises(KvmError, match=words) as refused:
            getattr(vm, method)(*args)
        assert (refused.value.ioctl, refused.value.errno) == (name, code)
        assert isinstance(refused.value, OSError)
        assert errno.errorcode[code] in str(refused.value)


@pytest.mark.parametrize(
    ("slot", "gpa", "size", "hva", "words"),
    [
        (1, 0x1001, 0x1000, 0, "guest_phys_addr 0x1001 is not a multiple of 4096"),
        (1, 0x1000, 0xFFF, 0, "memory_size 0xfff is not a multiple of 4096"),
        (1, 0x1000, 0x1000, 8, "userspace_addr 0x8 is not a multiple of 4096"),
        (32, 0, 0x1000, 0, r"slot 32 is not below 32 \(KVM_CAP_NR_MEMSLOTS\)"),
        (0x2_0000, 0, 0x1000, 0, r"slot 0x20000 say address space 2, and this VM has 2"),
        (2, 0, 0, 0, "slot 2 does not exist, so memory_size=0 has nothing to delete"),
        (1, 0, 0x2000, 0, "slot 1 has 0x1000 bytes already: delete it first"),
        (1, 0, 0x1000, 0, "a slot number that is too large, a size other"),  # who knows why
    ],
)
def test_a_refused_memory_slot_is_told_which_rule_it_broke(
    slot: int, gpa: int, size: int, hva: int, words: str
) -> None:
    with fake_vcpu() as (kernel, _, vm, _):
        vm.set_user_memory_region(1, 0, 0x1000, 0)
        kernel.caps["KVM_CAP_NR_MEMSLOTS"] = 32
        kernel.caps["KVM_CAP_MULTI_ADDRESS_SPACE"] = 2
        for name in ("KVM_SET_USER_MEMORY_REGION", "KVM_SET_USER_MEMORY_REGION2"):
            kernel.answers[name] = -errno.EINVAL
            with pytest.raises(KvmError, match=words):
                getattr(vm, name[4:].lower())(slot, gpa, size, hva)
        kernel.answers["KVM_GET_DIRTY_LOG"] = 0
        vm.get_dirty_log(1)  # a slot that could not be changed is as it was


def test_a_capability_that_does_not_exist_is_told_with_its_like() -> None:
    with fake_vcpu() as (kernel, kvm, _, _):
        for name in ("IRQCHIP", "kvm_cap_irqchip", "KVM_CAP_IRQCHIPS"):
            with pytest.raises(ValueError, match=rf"'{name}': KVM_CAP_IRQCHIP[,?]"):
                kvm.check_extension(name)
        for name in ("KVM_CAP_SAUERKRAUT", "KVM_EXIT_IO"):
            with pytest.raises(ValueError, match=rf"no capability is called '{name}'$"):
                kvm.check_extension(name)
        kernel.caps["KVM_CAP_IRQCHIP"] = 5
        assert kvm.check_extension("KVM_CAP_IRQCHIP") == 5


def test_every_hint_is_for_an_ioctl_and_an_errno_that_exist() -> None:
    for name, code in hints._HINTS:
        assert hasattr(lib, name)
        assert hasattr(errno, code)


def test_an_errno_nobody_explains_still_names_the_ioctl() -> None:
    with fake_vcpu() as (kernel, _, vm, _):
        kernel.answers["KVM_GET_CLOCK"] = -errno.EXDEV
        with pytest.raises(KvmError, match=r"^KVM_GET_CLOCK: EXDEV \(.*\)$"):
            vm.get_clock()


def test_an_interrupted_ioctl_is_made_again() -> None:
    with fake_vcpu() as (kernel, _, vm, _):
        answers = iter([-errno.EINTR, -errno.EINTR, 0])
        kernel.answers["KVM_CREATE_IRQCHIP"] = lambda arg: next(answers)
        vm.create_irqchip()
        assert len(kernel.named("KVM_CREATE_IRQCHIP")) == 3


def test_closed_handles_say_so() -> None:
    with fake_vcpu() as (kernel, kvm, vm, vcpu):
        run = vcpu.kvm_run
        for handle in (vcpu, vm, kvm):
            handle.close()
            handle.close()
            assert handle.closed
            assert "closed" in repr(handle)
            with pytest.raises(ClosedError, match=f"this {handle.kind} is closed"):
                _ = handle.fd
        kernel.calls.clear()
        for attempt in (
            vcpu.get_regs,
            vcpu.run,
            lambda: vcpu.kvm_run,
            lambda: vcpu.immediate_exit,
            lambda: vcpu.complete_io(1),
            vcpu.coalesced,
            vm.get_clock,
            lambda: vm.create_vcpu(1),
            kvm.create_vm,
        ):
            with pytest.raises(ClosedError):
                attempt()
        assert kernel.calls == []
        run.immediate_exit = 1  # a pointer that was kept keeps its mapping
        assert run.immediate_exit == 1


def test_closing_gives_back_descriptors_and_mapping() -> None:
    with fake_kernel():
        before = len(os.listdir("/proc/self/fd"))
        with k.Kvm("/dev/null") as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
            assert "fake-vcpu" in Path("/proc/self/maps").read_text()
            assert vcpu.fileno() == vcpu.fd
        assert "fake-vcpu" not in Path("/proc/self/maps").read_text()
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_leaked_handle_is_closed_and_reported() -> None:
    with fake_vcpu() as (_, kvm, _, _):
        vm = kvm.create_vm()
        fd = vm.fd
        with pytest.warns(ResourceWarning, match=rf"unclosed <pykvm.kvm.Vm fd {fd}>"):
            del vm
            gc.collect()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_leak_is_closed_even_where_warnings_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[BaseException] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda said: told.append(said.exc_value))
    with fake_vcpu() as (_, kvm, _, _):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fd = kvm.create_vm().fd
            gc.collect()
        assert [type(error) for error in told] == [ResourceWarning]
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_vcpu_that_cannot_be_mapped_leaks_nothing() -> None:
    with fake_vcpu() as (kernel, _, vm, _):
        before = len(os.listdir("/proc/self/fd"))
        kernel.answers["KVM_CREATE_VCPU"] = lambda arg: os.open("/dev/null", os.O_RDWR)
        with pytest.raises(OSError):
            vm.create_vcpu(1)
        assert len(os.listdir("/proc/self/fd")) == before


# -- no KVM --------------------------------------------------------------------------------------


def test_a_missing_device_names_module_and_container() -> None:
    with pytest.raises(CapabilityError, match="there is no /nowhere/kvm") as missing:
        k.Kvm("/nowhere/kvm")
    there = os.path.exists("/dev/kvm")
    assert ("use /dev/kvm" if there else "--device") in str(missing.value)
    assert missing.value.capability == ""


@pytest.mark.parametrize(
    ("cpuinfo", "words"),
    [
        ("flags : fpu vmx", "modprobe kvm_intel"),
        ("flags : fpu svm", "modprobe kvm_amd"),
        ("flags : fpu hypervisor", "nested"),
        ("flags : fpu", "firmware"),
        ("", "firmware"),
    ],
)
@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENODEV, errno.ENXIO])
def test_the_remedy_depends_on_what_the_processor_shows(
    tmp_path: Path, cpuinfo: str, words: str, code: int
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    text = hints.no_kvm("/dev/kvm", code, str(tmp_path))
    assert words in text
    assert "/dev/kvm" in text


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM])
def test_a_forbidden_device_names_the_group_to_join(tmp_path: Path, code: int) -> None:
    device = tmp_path / "kvm"
    device.touch()
    text = hints.no_kvm(str(device), code)
    assert "usermod -aG" in text
    assert str(device) in text
    assert "-aG root" not in text  # membership in root is no remedy


def test_another_error_on_opening_is_named() -> None:
    assert "EMFILE" in hints.no_kvm("/dev/kvm", errno.EMFILE)


def test_another_version_of_the_api_is_refused() -> None:
    with fake_kernel() as kernel:
        kernel.answers["KVM_GET_API_VERSION"] = 10
        with pytest.raises(CapabilityError, match="version 10"):
            k.Kvm("/dev/null")


def test_a_file_that_is_not_kvm_is_refused() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CapabilityError, match="not a KVM device"):
        k.Kvm("/dev/null")
    assert len(os.listdir("/proc/self/fd")) == before


# -- constants -----------------------------------------------------------------------------------


def test_every_constant_of_the_header_is_an_attribute_of_the_package() -> None:
    assert k.KVM_CAP_SYNC_REGS == lib.KVM_CAP_SYNC_REGS == 74
    assert k.MSR_KVM_SYSTEM_TIME_NEW == 0x4B564D01
    assert k.GUEST_MEMFD_FLAG_MMAP == 1
    assert {"KVM_CAP_SYNC_REGS", "MSR_KVM_SYSTEM_TIME_NEW", "GUEST_MEMFD_FLAG_MMAP"} <= {*dir(k)}
    with pytest.raises(AttributeError, match="KVM_CAP_NO_SUCH"):
        _ = k.KVM_CAP_NO_SUCH
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = k.nonsense


def test_all_that_is_exported_is_there() -> None:
    for name in k.__all__:
        assert getattr(k, name) is not None
        assert name in dir(k)


def test_every_described_capability_has_a_number() -> None:
    numbers = k.caps.numbers()
    assert k.caps.DESCRIPTIONS.keys() <= numbers.keys()
    assert k.caps.describe("KVM_CAP_S390_GMAP") == ""
    with fake_kernel(cap_default=0) as kernel, k.Kvm("/dev/null") as kvm:
        kernel.caps["KVM_CAP_MCE"] = 10
        probed = k.caps.probe(kvm)
        assert probed["KVM_CAP_MCE"] == 10
        assert sum(probed.values()) == 10
        assert probed.keys() == k.caps.DESCRIPTIONS.keys()


def test_an_msr_error_survives_pickling() -> None:
    error = k.MsrError("KVM_SET_MSRS", 0x10, 3, 0x99)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.index, copy.done, str(copy)) == (0x10, 3, str(error))


def test_each_getter_call_returns_a_structure_of_its_own() -> None:
    with fake_vcpu() as (_, _, _, vcpu):
        first, second = vcpu.get_regs(), vcpu.get_regs()
        first.rip = 5
        assert second.rip == 0
        assert ffi.typeof(first) is ffi.typeof("struct kvm_regs *")


@pytest.mark.parametrize(
    ("flags", "misc", "words"),
    [
        ("fpu hypervisor", "232 kvm\n", ["does have KVM", "mknod /dev/kvm c 10 232", "--device"]),
        ("fpu vmx", "232 kvm\n", ["does have KVM", "mknod"]),
        ("fpu vmx", "228 hpet\n", ["modprobe kvm_intel"]),
        ("fpu svm hypervisor", "", ["modprobe kvm_amd"]),
        ("fpu hypervisor", "228 hpet\n", ["without nested virtualization"]),
        ("fpu", "\n", ["VT-x, AMD-V"]),
    ],
)
def test_a_missing_device_file_is_not_taken_for_a_missing_kvm(
    tmp_path: Path, flags: str, misc: str, words: list[str]
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\n")
    (tmp_path / "misc").write_text(misc)
    text = hints.no_kvm("/dev/kvm", errno.ENOENT, str(tmp_path))
    assert text.startswith("there is no /dev/kvm: ")
    for word in words:
        assert word in text
    if "kvm" in misc:
        assert "nested" not in text and "modprobe" not in text


def test_without_proc_the_advice_is_the_general_one(tmp_path: Path) -> None:
    assert "firmware" in hints.no_kvm("/dev/kvm", errno.ENODEV, str(tmp_path / "none"))
