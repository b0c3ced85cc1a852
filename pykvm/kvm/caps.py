"""The capabilities of KVM: names, numbers, and what they are good for in words.

Numbers come from the header, through ``lib``; the words are for messages and for ``pykvm doctor``.
"""

from __future__ import annotations

from pykvm._abi import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .handle import CapHandle

#: What each capability that x86 can have stands for. One a line: these are answers to "this KVM
#: does not have …" as well as to "what can this KVM do".
DESCRIPTIONS: dict[str, str] = {
    "KVM_CAP_IRQCHIP": "in-kernel PIC, IOAPIC and local APICs",
    "KVM_CAP_HLT": "HLT is handled",
    "KVM_CAP_MMU_SHADOW_CACHE_CONTROL": "a limit on the pages of page tables KVM keeps",
    "KVM_CAP_USER_MEMORY": "guest memory from this process's memory",
    "KVM_CAP_SET_TSS_ADDR": "a choice of place for KVM's TSS (Intel)",
    "KVM_CAP_VAPIC": "a task priority register shared with the guest",
    "KVM_CAP_EXT_CPUID": "CPUID leaves with sub-leaves",
    "KVM_CAP_CLOCKSOURCE": "kvmclock for the guest",
    "KVM_CAP_NR_VCPUS": "recommended most vCPUs of a VM",
    "KVM_CAP_NR_MEMSLOTS": "most memory slots of a VM",
    "KVM_CAP_PIT": "in-kernel i8254 timer",
    "KVM_CAP_NOP_IO_DELAY": "the guest need not delay after port I/O",
    "KVM_CAP_MP_STATE": "reading and writing whether a vCPU runs, halts or waits for SIPI",
    "KVM_CAP_COALESCED_MMIO": "MMIO writes that wait in a ring, without exits",
    "KVM_CAP_SYNC_MMU": "changes of this process's mappings reach the guest",
    "KVM_CAP_DESTROY_MEMORY_REGION_WORKS": "memory slots can be deleted",
    "KVM_CAP_USER_NMI": "injecting an NMI",
    "KVM_CAP_SET_GUEST_DEBUG": "breakpoints and single steps from outside",
    "KVM_CAP_REINJECT_CONTROL": "a choice of what happens to missed PIT ticks",
    "KVM_CAP_IRQ_ROUTING": "GSI routes: how many lines there are",
    "KVM_CAP_IRQ_INJECT_STATUS": "an answer to whether an interrupt was delivered",
    "KVM_CAP_JOIN_MEMORY_REGIONS_WORKS": "adjacent memory slots work",
    "KVM_CAP_MCE": "machine checks: how many banks",
    "KVM_CAP_IRQFD": "eventfds that raise interrupts",
    "KVM_CAP_PIT2": "in-kernel i8254 timer, with flags",
    "KVM_CAP_SET_BOOT_CPU_ID": "a choice of bootstrap processor",
    "KVM_CAP_PIT_STATE2": "reading and writing the PIT's state",
    "KVM_CAP_IOEVENTFD": "eventfds that a guest's write signals, without an exit",
    "KVM_CAP_SET_IDENTITY_MAP_ADDR": "a choice of place for KVM's identity map (Intel)",
    "KVM_CAP_XEN_HVM": "running Xen guests: flags",
    "KVM_CAP_ADJUST_CLOCK": "reading and setting kvmclock: flags it returns",
    "KVM_CAP_INTERNAL_ERROR_DATA": "internal errors come with details",
    "KVM_CAP_VCPU_EVENTS": "reading and writing pending exceptions, interrupts and NMIs",
    "KVM_CAP_HYPERV": "Hyper-V enlightenments",
    "KVM_CAP_HYPERV_VAPIC": "Hyper-V APIC registers",
    "KVM_CAP_HYPERV_SPIN": "Hyper-V spinlock hints",
    "KVM_CAP_PCI_SEGMENT": "PCI segments (device assignment, removed)",
    "KVM_CAP_INTR_SHADOW": "interrupt shadows in the vCPU's events",
    "KVM_CAP_DEBUGREGS": "reading and writing the debug registers",
    "KVM_CAP_X86_ROBUST_SINGLESTEP": "single steps across instructions that touch flags",
    "KVM_CAP_ENABLE_CAP": "switching capabilities on for a vCPU",
    "KVM_CAP_XSAVE": "reading and writing the FPU state in XSAVE's form",
    "KVM_CAP_XCRS": "reading and writing XCR0",
    "KVM_CAP_ASYNC_PF": "page faults of the host shown to the guest",
    "KVM_CAP_TSC_CONTROL": "a TSC frequency of the vCPU's own: scaling in hardware",
    "KVM_CAP_GET_TSC_KHZ": "asking for the TSC frequency",
    "KVM_CAP_MAX_VCPUS": "most vCPUs of a VM",
    "KVM_CAP_ONE_REG": "single registers by their id",
    "KVM_CAP_TSC_DEADLINE_TIMER": "APIC timer in TSC-deadline mode",
    "KVM_CAP_SYNC_REGS": "registers in the run page, without ioctls: which sets",
    "KVM_CAP_KVMCLOCK_CTRL": "telling a guest that it was paused",
    "KVM_CAP_SIGNAL_MSI": "sending a message-signalled interrupt",
    "KVM_CAP_READONLY_MEM": "read-only memory slots",
    "KVM_CAP_IRQFD_RESAMPLE": "eventfds for level-triggered interrupts",
    "KVM_CAP_DEVICE_CTRL": "in-kernel devices with attributes",
    "KVM_CAP_EXT_EMUL_CPUID": "a list of the features KVM emulates",
    "KVM_CAP_HYPERV_TIME": "Hyper-V reference time",
    "KVM_CAP_IOAPIC_POLARITY_IGNORED": "interrupt polarity does not matter",
    "KVM_CAP_ENABLE_CAP_VM": "switching capabilities on for a VM",
    "KVM_CAP_IOEVENTFD_NO_LENGTH": "MMIO ioeventfds of any length",
    "KVM_CAP_VM_ATTRIBUTES": "attributes of a VM",
    "KVM_CAP_CHECK_EXTENSION_VM": "asking a VM for its capabilities",
    "KVM_CAP_DISABLE_QUIRKS": "switching historic behaviour off",
    "KVM_CAP_X86_SMM": "system management mode",
    "KVM_CAP_MULTI_ADDRESS_SPACE": "guest address spaces (SMM has its own)",
    "KVM_CAP_SPLIT_IRQCHIP": "local APICs in the kernel, PIC and IOAPIC in userspace",
    "KVM_CAP_IOEVENTFD_ANY_LENGTH": "ioeventfds of any length",
    "KVM_CAP_HYPERV_SYNIC": "Hyper-V synthetic interrupts",
    "KVM_CAP_VCPU_ATTRIBUTES": "attributes of a vCPU",
    "KVM_CAP_MAX_VCPU_ID": "one above the largest vCPU id",
    "KVM_CAP_X2APIC_API": "32-bit APIC IDs: flags",
    "KVM_CAP_IMMEDIATE_EXIT": "leaving KVM_RUN at once, without a signal's race",
    "KVM_CAP_X86_DISABLE_EXITS": "HLT, PAUSE, MWAIT without exits: which",
    "KVM_CAP_HYPERV_SYNIC2": "Hyper-V synthetic interrupts, without side effects",
    "KVM_CAP_HYPERV_VP_INDEX": "Hyper-V processor index",
    "KVM_CAP_GET_MSR_FEATURES": "MSRs that tell processor features",
    "KVM_CAP_HYPERV_EVENTFD": "Hyper-V events to eventfds",
    "KVM_CAP_HYPERV_TLBFLUSH": "Hyper-V TLB flushes",
    "KVM_CAP_NESTED_STATE": "saving nested virtualization: largest state in bytes",
    "KVM_CAP_MSR_PLATFORM_INFO": "hiding MSR_PLATFORM_INFO",
    "KVM_CAP_HYPERV_SEND_IPI": "Hyper-V interrupts between processors",
    "KVM_CAP_COALESCED_PIO": "port writes that wait in a ring, without exits",
    "KVM_CAP_HYPERV_ENLIGHTENED_VMCS": "Hyper-V's enlightened VMCS",
    "KVM_CAP_EXCEPTION_PAYLOAD": "exceptions with CR2 or DR6 in the vCPU's events",
    "KVM_CAP_HYPERV_CPUID": "Hyper-V CPUID leaves of a vCPU",
    "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2": "dirty logs that are cleared by hand",
    "KVM_CAP_PMU_EVENT_FILTER": "limits on the performance events a guest counts",
    "KVM_CAP_HYPERV_DIRECT_TLBFLUSH": "Hyper-V TLB flushes of nested guests",
    "KVM_CAP_HALT_POLL": "a time to poll before a halted vCPU sleeps",
    "KVM_CAP_ASYNC_PF_INT": "page faults of the host shown by interrupt",
    "KVM_CAP_LAST_CPU": "the host processor of a failed entry",
    "KVM_CAP_SMALLER_MAXPHYADDR": "a guest with fewer physical address bits than the host",
    "KVM_CAP_STEAL_TIME": "stolen time shown to the guest",
    "KVM_CAP_X86_USER_SPACE_MSR": "MSR accesses that exit to userspace",
    "KVM_CAP_X86_MSR_FILTER": "limits on the MSRs a guest touches",
    "KVM_CAP_ENFORCE_PV_FEATURE_CPUID": "only the paravirtual features that CPUID shows",
    "KVM_CAP_SYS_HYPERV_CPUID": "Hyper-V CPUID leaves, asked of the system",
    "KVM_CAP_DIRTY_LOG_RING": "dirty pages in a ring for each vCPU: most bytes",
    "KVM_CAP_X86_BUS_LOCK_EXIT": "exits on bus locks",
    "KVM_CAP_SET_GUEST_DEBUG2": "which guest debug controls there are",
    "KVM_CAP_SGX_ATTRIBUTE": "privileged SGX attributes",
    "KVM_CAP_VM_COPY_ENC_CONTEXT_FROM": "sharing an SEV encryption context",
    "KVM_CAP_PTP_KVM": "host time for the guest (PTP)",
    "KVM_CAP_HYPERV_ENFORCE_CPUID": "only the Hyper-V features that CPUID shows",
    "KVM_CAP_SREGS2": "special registers with PAE's PDPTRs",
    "KVM_CAP_EXIT_HYPERCALL": "hypercalls that exit to userspace: which",
    "KVM_CAP_BINARY_STATS_FD": "statistics by name, through a file",
    "KVM_CAP_EXIT_ON_EMULATION_FAILURE": "every emulation failure exits to userspace",
    "KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM": "moving an SEV encryption context",
    "KVM_CAP_VM_GPA_BITS": "bits of a guest-physical address",
    "KVM_CAP_XSAVE2": "FPU state beyond 4096 bytes: its size",
    "KVM_CAP_SYS_ATTRIBUTES": "attributes of the system",
    "KVM_CAP_PMU_CAPABILITY": "switching the guest's performance counters off",
    "KVM_CAP_DISABLE_QUIRKS2": "switching historic behaviour off: which",
    "KVM_CAP_VM_TSC_CONTROL": "a TSC frequency for all new vCPUs",
    "KVM_CAP_SYSTEM_EVENT_DATA": "system events come with details",
    "KVM_CAP_X86_TRIPLE_FAULT_EVENT": "a pending triple fault in the vCPU's events",
    "KVM_CAP_X86_NOTIFY_VMEXIT": "exits when a guest holds off interrupts (Intel)",
    "KVM_CAP_VM_DISABLE_NX_HUGE_PAGES": "huge pages without the iTLB-multihit workaround",
    "KVM_CAP_DIRTY_LOG_RING_ACQ_REL": "dirty rings, with explicit memory ordering: most bytes",
    "KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP": "dirty rings beside a bitmap for pages without a vCPU",
    "KVM_CAP_PMU_EVENT_MASKED_EVENTS": "performance event filters with masks",
    "KVM_CAP_USER_MEMORY2": "memory slots with a guest_memfd",
    "KVM_CAP_MEMORY_FAULT_INFO": "KVM_RUN says where guest memory could not be reached",
    "KVM_CAP_MEMORY_ATTRIBUTES": "private and shared guest memory: which attributes",
    "KVM_CAP_GUEST_MEMFD": "memory that belongs to a VM alone",
    "KVM_CAP_VM_TYPES": "kinds of VM: which",
    "KVM_CAP_PRE_FAULT_MEMORY": "mapping guest memory before it is touched",
    "KVM_CAP_X86_APIC_BUS_CYCLES_NS": "an APIC timer frequency of one's choice",
    "KVM_CAP_X86_GUEST_MODE": "the run page says whether a nested guest ran",
    "KVM_CAP_GUEST_MEMFD_FLAGS": "which flags a guest_memfd takes",
}


def describe(cap: str) -> str:
    """What a capability stands for, in a few words; "" for one of another architecture."""
    return DESCRIPTIONS.get(cap, "")


def numbers() -> dict[str, int]:
    """Every capability this package knows, of any architecture: its number by name."""
    return {name: getattr(lib, name) for name in dir(lib) if name.startswith("KVM_CAP_")}


def probe(handle: CapHandle) -> dict[str, int]:
    """What a Kvm or a Vm answers for each capability of x86, by name; 0 is a missing one."""
    known = numbers()
    return {name: handle.check_extension(known[name]) for name in DESCRIPTIONS if name in known}
