"""What belongs to the VM itself: interrupt controllers, timer, clock."""

from __future__ import annotations

from pykvm._abi import ffi, lib
from pykvm.errors import KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.kvm import Vm

CHIPS = {
    "pic-master": lib.KVM_IRQCHIP_PIC_MASTER,
    "pic-slave": lib.KVM_IRQCHIP_PIC_SLAVE,
    "ioapic": lib.KVM_IRQCHIP_IOAPIC,
}

STRUCTS = {
    **dict.fromkeys(CHIPS, ("struct kvm_irqchip", "KVM_SET_IRQCHIP")),
    "pit": ("struct kvm_pit_state2", "KVM_SET_PIT2"),
    "clock": ("struct kvm_clock_data", "KVM_SET_CLOCK"),
}
"""Each part's structure and ioctl, in the order in which they are put back."""


def capture(vm: Vm, kernel_irqchip: bool, pit: bool) -> dict[str, bytes]:
    """Take the state; the bytes of KVM's structures by name."""
    parts: dict[str, Any] = {}
    if kernel_irqchip:
        for name, number in CHIPS.items():
            parts[name] = vm.get_irqchip(number)
    if pit:
        parts["pit"] = vm.get_pit2()
    try:
        clock = vm.get_clock().clock
        # No flags: the clock stands still from here until it is put back.
        parts["clock"] = ffi.new("struct kvm_clock_data *", {"clock": clock})
    except KvmError:
        pass
    return {name: bytes(ffi.buffer(struct)) for name, struct in parts.items()}


def struct(name: str, data: bytes) -> Any:
    """A part as a new cffi structure."""
    made = ffi.new(f"{STRUCTS[name][0]} *")
    ffi.memmove(made, data, min(len(data), ffi.sizeof(made[0])))
    return made
