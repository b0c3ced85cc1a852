"""Each ioctl's request and the bytes of its argument, held against the kernel's ABI by hand.

The expected bytes are packed here with :mod:`struct` from the layouts of linux/kvm.h and
asm/kvm.h, so a slip in a field, its width or its place shows, also for ioctls that no KVM at hand
has.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from struct import pack
from typing import Any

import pytest

from pykvm import kvm as k
from pykvm._abi import ffi, lib
from pykvm.errors import KvmError
from tests.support.fake_ioctl import FakeKernel, fake_vcpu, peek, put
from tests.support.ioctl_bytes import NUMBERS, STRUCTS

Fake = tuple[FakeKernel, k.Kvm, k.Vm, k.Vcpu]


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fake_vcpu() as made:
        yield made


def pointee(size: int) -> tuple[list[bytes], Callable[[Any], int]]:
    """An answer that notes the bytes its argument's ``addr`` points to."""
    seen: list[bytes] = []

    def answer(arg: Any) -> int:
        seen.append(peek(arg.addr, size))
        return 0

    return seen, answer


def subject(fake: Fake, which: str) -> Any:
    return dict(zip(("kvm", "vm", "vcpu"), fake[1:], strict=True))[which]


@pytest.mark.parametrize(
    ("which", "method", "args", "number"), NUMBERS, ids=lambda value: str(value)[:30]
)
def test_a_plain_number_is_the_argument_itself(
    fake: Fake, which: str, method: str, args: tuple[Any, ...], number: int
) -> None:
    target = subject(fake, which)
    result = getattr(target, method)(*args)
    call = fake[0].last
    assert call.name == f"KVM_{method.upper()}"
    assert call.fd == target.fd
    assert (call.data, call.number) == (None, number)
    if hasattr(result, "close"):
        result.close()


@pytest.mark.parametrize(
    ("which", "method", "args", "expected"),
    STRUCTS,
    ids=[f"{which}.{method}" for which, method, _, _ in STRUCTS],
)
def test_a_structure_has_the_kernels_layout(
    fake: Fake, which: str, method: str, args: dict[str, Any], expected: bytes
) -> None:
    target = subject(fake, which)
    result = getattr(target, method)(**args)
    call = fake[0].last
    assert call.name == f"KVM_{method.upper()}"
    assert call.fd == target.fd
    assert call.data is not None
    assert call.data.hex() == expected.hex()
    if method == "create_guest_memfd":
        os.close(result)


@pytest.mark.parametrize("target", ["vm", "vcpu"])
@pytest.mark.parametrize("cap", [lib.KVM_CAP_SPLIT_IRQCHIP, "KVM_CAP_SPLIT_IRQCHIP"])
def test_enable_cap_takes_a_number_or_a_name_and_up_to_four_arguments(
    fake: Fake, target: str, cap: int | str
) -> None:
    fake[0].answers["KVM_ENABLE_CAP"] = 3
    assert subject(fake, target).enable_cap(cap, 24, 2, 3, 1 << 63) == 3
    assert fake[0].last.data == pack("<II4Q64x", 121, 0, 24, 2, 3, 1 << 63)
    with pytest.raises(IndexError):
        subject(fake, target).enable_cap(cap, 1, 2, 3, 4, 5)


# Setters of a structure that their getter returns: (object, name, structure).
PAIRS = [
    ("vm", "irqchip", "struct kvm_irqchip *"),
    ("vm", "pit2", "struct kvm_pit_state2 *"),
    ("vm", "clock", "struct kvm_clock_data *"),
    ("vcpu", "regs", "struct kvm_regs *"),
    ("vcpu", "sregs", "struct kvm_sregs *"),
    ("vcpu", "sregs2", "struct kvm_sregs2 *"),
    ("vcpu", "fpu", "struct kvm_fpu *"),
    ("vcpu", "xsave", "struct kvm_xsave *"),
    ("vcpu", "xcrs", "struct kvm_xcrs *"),
    ("vcpu", "lapic", "struct kvm_lapic_state *"),
    ("vcpu", "vcpu_events", "struct kvm_vcpu_events *"),
    ("vcpu", "debugregs", "struct kvm_debugregs *"),
]


@pytest.mark.parametrize(("which", "name", "ctype"), PAIRS, ids=[name for _, name, _ in PAIRS])
def test_what_a_getter_returns_its_setter_takes_byte_for_byte(
    fake: Fake, which: str, name: str, ctype: str
) -> None:
    kernel, target = fake[0], subject(fake, which)
    size = ffi.sizeof(ffi.typeof(ctype).item)
    image = bytes(i * 7 + 1 & 0xFF for i in range(size))

    def fill(arg: Any) -> int:
        assert ffi.typeof(arg) is ffi.typeof(ctype)
        ffi.memmove(arg, image, size)
        return 0

    kernel.caps["KVM_CAP_XSAVE2"] = 4096
    kernel.answers[f"KVM_GET_{name.upper()}"] = fill
    got = getattr(target, f"get_{name}")(*([2] if name == "irqchip" else []))
    assert kernel.last.name == f"KVM_GET_{name.upper()}"
    put_back = getattr(target, f"set_{name}")
    put_back(got)
    assert kernel.last.name == f"KVM_SET_{name.upper()}"
    assert kernel.last.data == image
    put_back(got[0])  # the structure itself will do as well
    assert kernel.last.data == image
    assert kernel.last.fd == target.fd


@pytest.mark.parametrize(("which", "name", "ctype"), PAIRS, ids=[name for _, name, _ in PAIRS])
def test_a_setter_refuses_a_structure_of_another_type(
    fake: Fake, which: str, name: str, ctype: str
) -> None:
    wrong = ffi.new("struct kvm_mp_state *")
    with pytest.raises(TypeError, match=ctype.removesuffix(" *")):
        getattr(subject(fake, which), f"set_{name}")(wrong)
    with pytest.raises(TypeError, match="not a str"):
        getattr(subject(fake, which), f"set_{name}")("registers")
    assert not fake[0].calls


def test_get_irqchip_asks_for_the_chip_it_was_told(fake: Fake) -> None:
    fake[2].get_irqchip(lib.KVM_IRQCHIP_IOAPIC)
    assert fake[0].last.data == pack("<I516x", 2)


def test_gsi_routes_have_the_kernels_layout(fake: Fake) -> None:
    fake[2].set_gsi_routing(
        [
            k.irqchip_route(4, lib.KVM_IRQCHIP_PIC_SLAVE, 3),
            k.msi_route(24, 0x1_FEE0_0000, 0x30),
        ]
    )
    assert fake[0].last.data == (
        pack("<II", 2, 0)
        + pack("<IIII", 4, 1, 0, 0)
        + pack("<II24x", 1, 3)
        + pack("<IIII", 24, 2, 0, 0)
        + pack("<IIII16x", 0xFEE0_0000, 1, 0x30, 0)
    )
    fake[2].set_gsi_routing([])
    assert fake[0].last.data == pack("<II", 0, 0)


def test_an_msr_filter_points_at_bitmaps_of_whole_words(fake: Fake) -> None:
    bitmaps: list[bytes] = []

    def read(arg: Any) -> int:
        bitmaps.extend(
            peek(
                int(ffi.cast("uintptr_t", arg.ranges[i].bitmap)),
                (arg.ranges[i].nmsrs + 63) // 64 * 8,
            )
            for i in range(2)
        )
        return 0

    fake[0].answers["KVM_X86_SET_MSR_FILTER"] = read
    fake[2].x86_set_msr_filter(
        [
            k.MsrRange(lib.KVM_MSR_FILTER_WRITE, 0x174, 3, b"\x05"),
            k.MsrRange(lib.KVM_MSR_FILTER_READ, 0xC000_0080, 65, b"\xff" * 20),
        ],
        flags=lib.KVM_MSR_FILTER_DEFAULT_DENY,
    )
    data = fake[0].last.data
    assert data is not None
    assert data[:4] == pack("<I", 1)
    assert data[8:20] == pack("<III", 2, 3, 0x174)
    assert data[32:44] == pack("<III", 1, 65, 0xC000_0080)
    assert data[56:] == bytes(len(data) - 56)
    assert bitmaps == [b"\x05" + bytes(7), b"\xff" * 16]


def test_an_msr_filter_has_at_most_sixteen_ranges(fake: Fake) -> None:
    with pytest.raises(ValueError, match="17 ranges"):
        fake[2].x86_set_msr_filter([k.MsrRange(1, 0x10, 1)] * 17)


def test_set_cpuid2_takes_entries_or_the_whole_structure(fake: Fake) -> None:
    entries = [
        ffi.new("struct kvm_cpuid_entry2 *", {"function": 7, "index": 1, "flags": 1, "eax": 2}),
        ffi.new("struct kvm_cpuid_entry2 *", {"function": 0x8000_0000, "edx": 5}),
    ]
    expected = (
        pack("<II", 2, 0)
        + pack("<IIIIIII12x", 7, 1, 1, 2, 0, 0, 0)
        + pack("<IIIIIII12x", 0x8000_0000, 0, 0, 0, 0, 0, 5)
    )
    fake[3].set_cpuid2(entries)
    assert fake[0].last.data == expected
    fake[3].set_cpuid2([entry[0] for entry in entries])
    assert fake[0].last.data == expected
    fake[3].set_cpuid2(k.new_cpuid2(entries))
    assert fake[0].last.data == expected


def test_dirty_logs_are_as_long_as_their_slot(fake: Fake) -> None:
    kernel, _, vm, _ = fake

    def fill(arg: Any) -> int:
        put(int(ffi.cast("uintptr_t", arg.dirty_bitmap)), b"\x81" + bytes(6) + b"\x80" + b"\x02")
        return 0

    kernel.answers["KVM_GET_DIRTY_LOG"] = fill
    vm.set_user_memory_region(2, 0, 70 * 4096, 0x1000, lib.KVM_MEM_LOG_DIRTY_PAGES)
    log = vm.get_dirty_log(2)
    assert len(log) == 16
    assert k.rings.dirty_pages(log) == [0, 7, 63, 65]
    data = kernel.last.data
    assert data is not None
    assert data[:8] == pack("<II", 2, 0)
    with pytest.raises(ValueError, match="slot 3 was not set"):
        vm.get_dirty_log(3)
    vm.set_user_memory_region(2, 0, 0, 0)
    with pytest.raises(ValueError, match="slot 2 was not set"):
        vm.get_dirty_log(2)


def test_clear_dirty_log_hands_over_the_bitmap(fake: Fake) -> None:
    kernel, _, vm, _ = fake
    seen = []

    def read(arg: Any) -> int:
        seen.append(peek(int(ffi.cast("uintptr_t", arg.dirty_bitmap)), 8))
        return 0

    kernel.answers["KVM_CLEAR_DIRTY_LOG"] = read
    vm.set_user_memory_region(2, 0, 130 * 4096, 0x1000)
    vm.clear_dirty_log(2, b"\x03", first_page=128)
    data = kernel.last.data
    assert data is not None
    assert data[:16] == pack("<IIQ", 2, 2, 128)  # only two pages are left of the slot
    assert seen == [b"\x03" + bytes(7)]
    vm.clear_dirty_log(2, bytes(16), first_page=64, num_pages=64)
    assert kernel.last.data is not None
    assert kernel.last.data[:16] == pack("<IIQ", 2, 64, 64)
    with pytest.raises(ValueError, match="65 pages"):
        vm.clear_dirty_log(2, bytes(8), num_pages=65)


@pytest.mark.parametrize("which", ["kvm", "vm", "vcpu", "device"])
def test_device_attributes_point_at_their_value(fake: Fake, which: str) -> None:
    kernel, kvm, vm, vcpu = fake
    device = vm.create_device(4)
    assert device is not None
    target: Any = {"kvm": kvm, "vm": vm, "vcpu": vcpu, "device": device}[which]
    kernel.answers["KVM_GET_DEVICE_ATTR"] = lambda arg: put(arg.addr, pack("<Q", 0x1234))
    assert target.get_device_attr(1, 2) == pack("<Q", 0x1234)
    assert target.get_device_attr(1, 2, size=4) == pack("<I", 0x1234)
    assert kernel.last.fd == target.fd
    assert target.has_device_attr(3, 4)
    assert kernel.last.data == pack("<IIQQ", 0, 3, 4, 0)
    kernel.answers["KVM_HAS_DEVICE_ATTR"] = -6  # ENXIO
    assert not target.has_device_attr(3, 4)
    kernel.answers["KVM_HAS_DEVICE_ATTR"] = -14  # EFAULT: no answer to the question
    with pytest.raises(KvmError, match="EFAULT"):
        target.has_device_attr(3, 4)
    if which != "kvm":
        seen, kernel.answers["KVM_SET_DEVICE_ATTR"] = pointee(4)
        target.set_device_attr(5, 6, b"\1\2\3\4")
        assert kernel.last.data is not None
        assert kernel.last.data[:16] == pack("<IIQ", 0, 5, 6)
        assert seen == [b"\1\2\3\4"]
    else:
        assert not hasattr(target, "set_device_attr")  # KVM has none to write
    device.close()


def test_create_device_returns_a_device_or_only_tests_for_one(fake: Fake) -> None:
    with fake[2].create_device(lib.KVM_DEV_TYPE_VFIO) or pytest.fail("no device") as device:
        assert isinstance(device, k.Device)
        assert (device.type, device.vm) == (lib.KVM_DEV_TYPE_VFIO, fake[2])
    assert fake[2].create_device(lib.KVM_DEV_TYPE_VFIO, lib.KVM_CREATE_DEVICE_TEST) is None


def test_one_reg_points_at_its_value(fake: Fake) -> None:
    kernel, _, _, vcpu = fake
    kernel.answers["KVM_GET_ONE_REG"] = lambda arg: put(arg.addr, pack("<Q", 77))
    assert vcpu.get_one_reg(0x2030_0002_C000_0080) == 77
    assert kernel.last.data is not None
    assert kernel.last.data[:8] == pack("<Q", 0x2030_0002_C000_0080)
    seen, kernel.answers["KVM_SET_ONE_REG"] = pointee(8)
    vcpu.set_one_reg(0x2030_0002_C000_0080, 99)
    assert seen == [pack("<Q", 99)]


def test_mce_capabilities_come_back_as_a_number(fake: Fake) -> None:
    def fill(arg: Any) -> int:
        arg[0] = 0x100_0020
        return 0

    fake[0].answers["KVM_X86_GET_MCE_CAP_SUPPORTED"] = fill
    assert fake[1].x86_get_mce_cap_supported() == 0x100_0020


def test_irq_line_status_and_signal_msi_return_what_became_of_the_interrupt(fake: Fake) -> None:
    def merged(arg: Any) -> int:
        arg.status = -1
        return 0

    fake[0].answers["KVM_IRQ_LINE_STATUS"] = merged
    assert fake[2].irq_line_status(3, 1) == -1
    fake[0].answers["KVM_SIGNAL_MSI"] = 2
    assert fake[2].signal_msi(0xFEE0_0000, 0x40) == 2


def test_pre_fault_memory_says_what_is_left(fake: Fake) -> None:
    def half(arg: Any) -> int:
        arg.gpa += 0x1000
        arg.size -= 0x1000
        return 0

    fake[0].answers["KVM_PRE_FAULT_MEMORY"] = half
    assert fake[3].pre_fault_memory(0, 0x3000) == 0x2000


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_a_number_that_c_would_cut_is_refused(fake: Fake, value: int) -> None:
    with pytest.raises(ValueError, match="unsigned long"):
        fake[2].set_tss_addr(value)
    assert not fake[0].calls


def test_there_is_no_signal_zero(fake: Fake) -> None:
    with pytest.raises(ValueError, match="no signal 0"):
        fake[3].set_signal_mask([0])
