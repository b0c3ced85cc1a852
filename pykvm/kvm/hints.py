"""What an errno means for the ioctl that returned it, in words. Loaded when something failed.

The sources are api.rst and the places in the kernel's arch/x86/kvm and virt/kvm that return them.
"""

from __future__ import annotations

import errno as _errno
import os

from pykvm._abi import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .vm_memory import MemoryMixin

_NO_IRQCHIP = "this VM has no in-kernel irqchip: create_irqchip() before the first vCPU"
_NO_LAPIC = "this vCPU has no in-kernel local APIC: create_irqchip() before create_vcpu()"
_NO_PIT = "this VM has no in-kernel PIT: create_pit2() first"
_TOO_LATE = "too late: this VM has a vCPU already"
_NO_LOG = "there is no such slot, or it was set without KVM_MEM_LOG_DIRTY_PAGES"
_MEMORY = (
    "misaligned (addresses and size are multiples of 4096), a slot number that is too large, a "
    "size other than the slot has (delete it first, with memory_size=0), or a flag that this KVM "
    "lacks"
)
_SREGS = (
    "no processor can be in this state: look for reserved bits, CR0.PG without CR0.PE, EFER.LME "
    "and CR0.PG without CR4.PAE, EFER.LMA that does not match, a CR4 bit that the vCPU's CPUID "
    "does not have (has set_cpuid2() been called?)"
)

#: (ioctl, errno name): meaning.
_HINTS: dict[tuple[str, str], str] = {
    ("KVM_CREATE_VM", "EINVAL"): "this KVM has no VM of that type (KVM_CAP_VM_TYPES)",
    ("KVM_CREATE_VM", "EBUSY"): "another hypervisor (VirtualBox, VMware) holds the processor's "
    "virtualization: stop it",
    ("KVM_CREATE_VM", "EIO"): "the processor refuses to switch virtualization on: look for kvm in "
    "dmesg (disabled in the firmware?)",
    ("KVM_CREATE_VM", "ENOMEM"): "out of memory, or out of a limit of this process's cgroup",
    ("KVM_CREATE_VM", "EMFILE"): "this process has too many open files (ulimit -n)",
    ("KVM_CREATE_VCPU", "EEXIST"): "this VM has a vCPU of that id already",
    ("KVM_CREATE_VCPU", "EINVAL"): "the id is not below KVM_CAP_MAX_VCPU_ID, or the VM has "
    "KVM_CAP_MAX_VCPUS vCPUs",
    ("KVM_CREATE_VCPU", "EMFILE"): "this process has too many open files (ulimit -n)",
    ("KVM_SET_USER_MEMORY_REGION", "EEXIST"): "it overlaps another slot",
    ("KVM_SET_USER_MEMORY_REGION", "EINVAL"): _MEMORY,
    ("KVM_SET_USER_MEMORY_REGION2", "EEXIST"): "it overlaps another slot",
    ("KVM_SET_USER_MEMORY_REGION2", "EINVAL"): _MEMORY + ", or a guest_memfd that this VM or "
    "range cannot have",
    ("KVM_SET_USER_MEMORY_REGION2", "EBADF"): "guest_memfd is not a file descriptor of this VM's",
    (
        "KVM_CREATE_GUEST_MEMFD",
        "EINVAL",
    ): "the size is not a positive multiple of 4096, or this KVM "
    "does not take the flags (KVM_CAP_GUEST_MEMFD_FLAGS)",
    ("KVM_SET_MEMORY_ATTRIBUTES", "EINVAL"): "misaligned, an empty range, flags, or an attribute "
    "that this VM does not have (KVM_CAP_MEMORY_ATTRIBUTES)",
    ("KVM_GET_DIRTY_LOG", "ENOENT"): _NO_LOG,
    ("KVM_CLEAR_DIRTY_LOG", "ENOENT"): _NO_LOG,
    ("KVM_GET_DIRTY_LOG", "ENXIO"): "this VM logs dirty pages in rings: vcpu.dirty_ring()",
    ("KVM_CLEAR_DIRTY_LOG", "ENXIO"): "this VM logs dirty pages in rings: reset_dirty_rings()",
    ("KVM_CLEAR_DIRTY_LOG", "EINVAL"): "first_page is not a multiple of 64, or the range is not "
    "inside the slot (num_pages a multiple of 64, or up to its end)",
    ("KVM_RESET_DIRTY_RINGS", "EINVAL"): "this VM has no dirty rings: enable "
    "KVM_CAP_DIRTY_LOG_RING before the first vCPU",
    ("KVM_SET_NR_MMU_PAGES", "EINVAL"): "the least is 64",
    ("KVM_GET_NR_MMU_PAGES", "ENOTTY"): "dropped from KVM in Linux 6.4",
    ("KVM_GET_NR_MMU_PAGES", "EINVAL"): "dropped from KVM in Linux 6.4",
    ("KVM_REGISTER_COALESCED_MMIO", "ENOSPC"): "too many devices and zones on this bus",
    ("KVM_CREATE_IRQCHIP", "EEXIST"): "this VM has an irqchip already",
    ("KVM_CREATE_IRQCHIP", "EINVAL"): _TOO_LATE,
    ("KVM_GET_IRQCHIP", "ENXIO"): _NO_IRQCHIP,
    ("KVM_SET_IRQCHIP", "ENXIO"): _NO_IRQCHIP,
    ("KVM_GET_IRQCHIP", "EINVAL"): "there is no chip of that chip_id",
    ("KVM_SET_IRQCHIP", "EINVAL"): "there is no chip of that chip_id",
    ("KVM_IRQ_LINE", "ENXIO"): _NO_IRQCHIP,
    ("KVM_IRQ_LINE_STATUS", "ENXIO"): _NO_IRQCHIP,
    ("KVM_CREATE_PIT2", "ENOENT"): _NO_IRQCHIP,
    ("KVM_CREATE_PIT2", "ENXIO"): _NO_IRQCHIP,
    ("KVM_CREATE_PIT2", "EEXIST"): "this VM has a PIT already",
    ("KVM_GET_PIT2", "ENXIO"): _NO_PIT,
    ("KVM_SET_PIT2", "ENXIO"): _NO_PIT,
    ("KVM_REINJECT_CONTROL", "ENXIO"): _NO_PIT,
    (
        "KVM_SET_GSI_ROUTING",
        "EINVAL",
    ): "a GSI that is not below KVM_CAP_IRQ_ROUTING, a pin its chip "
    "does not have, two routes of one GSI to one chip, or no in-kernel irqchip",
    ("KVM_SIGNAL_MSI", "EINVAL"): _NO_LAPIC,
    ("KVM_IRQFD", "EBUSY"): "this eventfd raises a GSI already",
    ("KVM_IRQFD", "EAGAIN"): _NO_IRQCHIP,
    ("KVM_IRQFD", "EINVAL"): "not an eventfd, a GSI out of range, or " + _NO_IRQCHIP,
    ("KVM_IRQFD", "EBADF"): "fd is not an open file descriptor",
    ("KVM_IOEVENTFD", "EEXIST"): "there is an ioeventfd of this address, length and datamatch",
    ("KVM_IOEVENTFD", "ENOENT"): "there is no ioeventfd of this address, length, datamatch and fd",
    ("KVM_IOEVENTFD", "ENOSPC"): "too many devices and ioeventfds on this bus",
    ("KVM_IOEVENTFD", "EINVAL"): "len is not 0, 1, 2, 4 or 8, datamatch is given with len 0, or fd "
    "is not an eventfd",
    ("KVM_IOEVENTFD", "EBADF"): "fd is not an open file descriptor",
    ("KVM_CREATE_DEVICE", "ENODEV"): "this KVM has no device of that type",
    ("KVM_CREATE_DEVICE", "EEXIST"): "this VM has one, and may have only one",
    ("KVM_CREATE_DEVICE", "EBUSY"): "this VM has one, and may have only one",
    ("KVM_GET_DEVICE_ATTR", "ENXIO"): "there is no such group or attribute here",
    ("KVM_SET_DEVICE_ATTR", "ENXIO"): "there is no such group or attribute here",
    ("KVM_GET_DEVICE_ATTR", "EPERM"): "this attribute cannot be read, or not now; or there are no "
    "attributes at all of this kind of file descriptor",
    ("KVM_SET_DEVICE_ATTR", "EPERM"): "this attribute cannot be written, or not now; or there are "
    "no attributes at all of this kind of file descriptor",
    ("KVM_HAS_DEVICE_ATTR", "EPERM"): "there are no attributes at all of this kind of device",
    ("KVM_ENABLE_CAP", "EINVAL"): "this capability cannot be enabled here, not with these "
    "arguments, or no longer (many only before the first vCPU)",
    ("KVM_SET_TSS_ADDR", "EINVAL"): "the three pages must end below 4 GiB",
    ("KVM_SET_IDENTITY_MAP_ADDR", "EINVAL"): _TOO_LATE,
    ("KVM_SET_BOOT_CPU_ID", "EBUSY"): _TOO_LATE,
    ("KVM_SET_CLOCK", "EINVAL"): "a flag that this KVM does not have (KVM_CAP_ADJUST_CLOCK)",
    ("KVM_SET_TSC_KHZ", "EINVAL"): "the host's TSC cannot be scaled to this (KVM_CAP_TSC_CONTROL), "
    "or of a VM: " + _TOO_LATE,
    ("KVM_GET_TSC_KHZ", "EIO"): "the host's TSC is unstable",
    ("KVM_X86_SET_MSR_FILTER", "EINVAL"): "a range without MSRs or of more than 12288, an unknown "
    "flag, or KVM_MSR_FILTER_DEFAULT_DENY without any range",
    ("KVM_SET_PMU_EVENT_FILTER", "E2BIG"): "too many events (300)",
    ("KVM_SET_PMU_EVENT_FILTER", "EINVAL"): "an action or a flag that this KVM does not have",
    ("KVM_RUN", "EAGAIN"): "this vCPU is an application processor that nobody has started (INIT "
    "and SIPI, or set_mp_state(KVM_MP_STATE_RUNNABLE))",
    ("KVM_RUN", "EFAULT"): "guest memory is not there in this process: its mapping is gone, "
    "protected, or behind the end of its file",
    ("KVM_RUN", "EINVAL"): "the run page asks for what KVM does not have (kvm_valid_regs, "
    "kvm_dirty_regs), holds registers it refuses, or this VM cannot be run",
    ("KVM_RUN", "ENOEXEC"): "the vCPU is not initialised",
    ("KVM_SET_SREGS", "EINVAL"): _SREGS,
    ("KVM_SET_SREGS2", "EINVAL"): _SREGS,
    ("KVM_GET_XSAVE", "EINVAL"): "this guest's state is larger than 4096 bytes: get_xsave2()",
    ("KVM_SET_XSAVE", "EINVAL"): "a component or MXCSR bit that host or guest does not have",
    ("KVM_SET_XCRS", "EINVAL"): "an XCR0 that CPUID leaf 0xd does not allow (bit 0 must be set)",
    ("KVM_GET_LAPIC", "EINVAL"): _NO_LAPIC,
    ("KVM_SET_LAPIC", "EINVAL"): _NO_LAPIC + "; or the APIC ID is not the vCPU's",
    ("KVM_SET_MP_STATE", "EINVAL"): "no such state on x86, or (all but RUNNABLE) " + _NO_LAPIC,
    ("KVM_SET_VCPU_EVENTS", "EINVAL"): "a flag that this KVM lacks or that was not enabled, or an "
    "exception that does not exist",
    ("KVM_SET_DEBUGREGS", "EINVAL"): "flags, or bits above 31 in DR6 or DR7",
    ("KVM_SET_NESTED_STATE", "EINVAL"): "a state of the other vendor's, or the guest's CPUID has "
    "no VMX or SVM",
    ("KVM_SET_CPUID2", "E2BIG"): "KVM takes 256 entries",
    ("KVM_SET_CPUID2", "EINVAL"): "the vCPU has run already and its CPUID may not change, or an "
    "address width or XSAVE feature that this host cannot give",
    ("KVM_GET_MSRS", "E2BIG"): "too many MSRs in one call",
    ("KVM_SET_MSRS", "E2BIG"): "too many MSRs in one call",
    ("KVM_GET_ONE_REG", "EINVAL"): "there is no such register, or not in this vCPU's CPUID",
    ("KVM_SET_ONE_REG", "EINVAL"): "there is no such register, or it does not take this value",
    ("KVM_KVMCLOCK_CTRL", "EINVAL"): "the guest has not set its kvmclock up",
    ("KVM_X86_SETUP_MCE", "EINVAL"): "no or too many banks (KVM_CAP_MCE), or more than "
    "x86_get_mce_cap_supported()",
    ("KVM_X86_SET_MCE", "EINVAL"): "a bank that x86_setup_mce() did not make, or bit 63 (VAL) of "
    "status is clear",
    ("KVM_INTERRUPT", "EEXIST"): "an interrupt is waiting to be injected already",
    ("KVM_INTERRUPT", "EINVAL"): "the vector is not in 0-255",
    ("KVM_INTERRUPT", "ENXIO"): "the interrupt controller is in the kernel: irq_line()",
    ("KVM_SET_GUEST_DEBUG", "EBUSY"): "an exception is pending already",
    ("KVM_SET_GUEST_DEBUG", "EINVAL"): "a control bit that this KVM does not have "
    "(KVM_CAP_SET_GUEST_DEBUG2)",
    ("KVM_SET_SIGNAL_MASK", "EINVAL"): "the mask does not have the kernel's size",
    ("KVM_TPR_ACCESS_REPORTING", "EINVAL"): "no flags are defined",
    ("KVM_SET_VAPIC_ADDR", "EINVAL"): _NO_LAPIC + "; or the address is not in guest memory",
    ("KVM_PRE_FAULT_MEMORY", "ENOENT"): "there is no memory slot at gpa",
    ("KVM_PRE_FAULT_MEMORY", "EOPNOTSUPP"): "this KVM maps guest memory by shadow page tables, "
    "which need the guest's own",
    ("KVM_PRE_FAULT_MEMORY", "EINVAL"): "misaligned, an empty range, or flags",
    ("KVM_PRE_FAULT_MEMORY", "EAGAIN"): "the slot is being changed: try again",
}

#: What an errno means whatever the ioctl, where nothing better is known.
_ANY: dict[str, str] = {
    "EIO": "a VM's file descriptors belong to the process that made it: after fork the child's "
    "return EIO (use spawn); a VM that KVM has found a bug in, and ended, returns it too",
    "ENOTTY": "this KVM does not know this ioctl",
    "EFAULT": "the argument, or memory that it points to, is not mapped",
    "EBADF": "the file descriptor was closed, or is no KVM file descriptor",
    "ENOMEM": "out of memory, or out of a limit of this process's cgroup",
    "EPERM": "not allowed in this state, or not to this process",
    "EACCES": "not allowed to this process",
}


def hint(name: str, errno: int) -> str:
    """What ``errno`` means when ioctl ``name`` fails with it, or ""."""
    code = _errno.errorcode.get(errno, "")
    return _HINTS.get((name, code)) or _ANY.get(code, "")


def broken_slot_rule(vm: MemoryMixin, region: Any) -> str:
    """Which rule a memory slot breaks that KVM refused with EINVAL; "" if none that is known.

    Those of ``__kvm_set_memory_region`` in virt/kvm/kvm_main.c, in its order.

    Args:
        region: struct kvm_userspace_memory_region, or its successor.
    """
    for name in ("memory_size", "guest_phys_addr", "userspace_addr"):
        if (value := int(getattr(region, name))) % 4096:
            return f"{name} {value:#x} is not a multiple of 4096"
    space, slot = divmod(int(region.slot), 0x10000)
    spaces = vm.check_extension(lib.KVM_CAP_MULTI_ADDRESS_SPACE) or 1
    if space >= spaces:
        return (
            f"bits 31:16 of slot {int(region.slot):#x} say address space {space}, and this VM has "
            f"{spaces} (KVM_CAP_MULTI_ADDRESS_SPACE)"
        )
    slots = vm.check_extension(lib.KVM_CAP_NR_MEMSLOTS)
    if slot >= slots:
        return f"slot {slot} is not below {slots} (KVM_CAP_NR_MEMSLOTS)"
    size, was = int(region.memory_size), vm._slot_pages.get(int(region.slot), 0) * 4096
    if not size and not was:
        return f"slot {slot} does not exist, so memory_size=0 has nothing to delete"
    if size and was and size != was:
        return f"slot {slot} has {was:#x} bytes already: delete it first, with memory_size=0"
    return ""


def no_kvm(path: str, errno: int, proc: str = "/proc") -> str:
    """Why ``path`` cannot be opened, and what to do about it; ``proc`` is where /proc is."""
    code = _errno.errorcode.get(errno, str(errno))
    if errno in (_errno.ENOENT, _errno.ENOTDIR):
        if path != _DEVICE and os.path.exists(_DEVICE):
            return f"there is no {path}: use {_DEVICE}, which is there"
        return f"there is no {path}: {_no_device(path, proc)}"
    if errno in (_errno.ENODEV, _errno.ENXIO):
        return f"{path} has no KVM behind it ({code}): {_no_module(proc)}"
    if errno in (_errno.EACCES, _errno.EPERM):
        return (
            f"{path} may not be opened by this process ({code}): {_join_group(path)}, or in a "
            f"container start it with --device {path}"
        )
    return f"{path} cannot be opened: {code}"


_DEVICE = "/dev/kvm"


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.readlines()
    except OSError:
        return []


def _no_device(path: str, proc: str) -> str:
    """What to do where there is no device file: just that is missing, or all of KVM."""
    for line in _lines(f"{proc}/misc"):  # misc devices of the running kernel: minor and name
        minor, _, name = line.strip().partition(" ")
        if name == "kvm":
            return (
                "the kernel does have KVM (/proc/misc lists it), only its device file is not here:"
                f" in a container, start it with --device {path}; else make it: sudo mknod {path} c"
                f" 10 {minor}; sudo chmod 660 {path}"
            )
    return _no_module(proc)


def _no_module(proc: str) -> str:
    """What to do where no KVM module is loaded; what applies depends on what the CPU shows."""
    inside = "in a container, start it with --device /dev/kvm"
    cpuinfo = _lines(f"{proc}/cpuinfo")
    flags = next((line for line in cpuinfo if line.startswith("flags")), "").split()
    if "vmx" in flags:
        return f"load the module (sudo modprobe kvm_intel); {inside}"
    if "svm" in flags:
        return f"load the module (sudo modprobe kvm_amd); {inside}"
    if "hypervisor" in flags:
        return (
            "this machine is itself a VM without nested virtualization: enable it on the host "
            f"(kvm_intel or kvm_amd: nested=1, and a CPU type that shows vmx or svm); {inside}"
        )
    return (
        "the processor shows neither VMX nor SVM: enable virtualization (VT-x, AMD-V, SVM) in the "
        f"firmware, then load kvm_intel or kvm_amd; {inside}"
    )


def _join_group(path: str) -> str:
    """How to get at the device file through the group that owns it."""
    join = "sudo usermod -aG {} $USER, then log in again"
    try:
        import grp

        group = grp.getgrgid(os.stat(path).st_gid).gr_name
    except (OSError, KeyError, ImportError):
        group = "kvm"
    if group == "root":
        return f"give it a group (sudo chgrp kvm {path}; sudo chmod 660 {path}) and join it (" + (
            join.format("kvm") + ")"
        )
    return f"join its group ({join.format(group)})"
