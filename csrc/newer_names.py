"""Names newer than the oldest linux/kvm.h that pykvm is built against (Linux 5.14).

A header that has a name wins; this table supplies what it lacks, so that the compiled module
offers the same names wherever it was built. What the running kernel can do is another question,
and only KVM_CHECK_EXTENSION answers it.

The numbers are ABI and never change; a test compares every one that the installed header knows,
and all of them were compared with the headers of Linux 5.14, 5.16, 6.1, 6.3, 6.13, 6.19 and 7.2.
``since``, the release that brought a name, was checked to lie between these; which one in between
is told by the kernel's history. It is for the reader, nothing is decided by it.

A few names are older than 5.14 in name only: their macros used what only the kernel has
(``GENMASK``), until Linux 6.9 or so mended them. They stand under the release of the name.

Left out: other architectures, and the *structures* (not the numbers) of interfaces that pykvm does
not offer: TDX, SEV-SNP, Xen.

To take up a new kernel release: add what its ``include/uapi/linux/kvm.h`` and
``arch/x86/include/uapi/asm/kvm*.h`` have got since.
"""

from __future__ import annotations

from typing import NamedTuple


class Constant(NamedTuple):
    """One integer name: the release that brought it, and its value as C text."""

    name: str
    since: str
    value: str


class Struct(NamedTuple):
    """One structure: its tag, the release that brought it (or its newest member), its C text."""

    tag: str
    since: str
    text: str


def _constants(text: str) -> tuple[Constant, ...]:
    found = []
    since = ""
    for line in text.strip().splitlines():
        name, _, value = line.strip().partition(" ")
        if name == "Linux":
            since = value
        elif name:
            found.append(Constant(name, since, value.strip()))
    return tuple(found)


#: The members of ``struct kvm_run`` among these are structures of our own, ``pykvm_run_*``, to be
#: laid over its union (at ``hw``): a struct as large as kvm_run cannot be supplied from here.
STRUCTS: tuple[Struct, ...] = (
    Struct(
        "kvm_stats_desc",
        "5.15",
        """struct kvm_stats_desc {
    __u32 flags;
    __s16 exponent;
    __u16 size;
    __u32 offset;
    __u32 bucket_size;
    char name[];
};""",
    ),
    Struct(
        "kvm_clock_data",
        "5.16",
        """struct kvm_clock_data {
    __u64 clock;
    __u32 flags;
    __u32 pad0;
    __u64 realtime, host_tsc;
    __u32 pad[4];
};""",
    ),
    Struct(
        "kvm_xsave",
        "5.17",
        """struct kvm_xsave {
    __u32 region[1024];
    __u32 extra[];
};""",
    ),
    Struct(
        "kvm_irq_routing_xen_evtchn",
        "5.17",
        "struct kvm_irq_routing_xen_evtchn { __u32 port, vcpu, priority; };",
    ),
    Struct(
        "pykvm_run_system_event",
        "5.18",
        """struct pykvm_run_system_event {
    __u32 type, ndata;
    union { __u64 flags; __u64 data[16]; };
};""",
    ),
    Struct("pykvm_run_notify", "6.0", "struct pykvm_run_notify { __u32 flags; };"),
    Struct(
        "kvm_vcpu_events",
        "6.0",
        """struct kvm_vcpu_events {
    struct { __u8 injected, nr, has_error_code, pending; __u32 error_code; } exception;
    struct { __u8 injected, nr, soft, shadow; } interrupt;
    struct { __u8 injected, pending, masked, pad; } nmi;
    __u32 sipi_vector;
    __u32 flags;
    struct { __u8 smm, pending, smm_inside_nmi, latched_init; } smi;
    struct { __u8 pending; } triple_fault;
    __u8 reserved[26];
    __u8 exception_has_payload;
    __u64 exception_payload;
};""",
    ),
    Struct(
        "pykvm_run_hypercall",
        "6.4",
        """struct pykvm_run_hypercall {
    __u64 nr, args[6], ret;
    union { __u32 longmode; __u64 flags; };
};""",
    ),
    Struct(
        "pykvm_run_memory_fault",
        "6.8",
        "struct pykvm_run_memory_fault { __u64 flags, gpa, size; };",
    ),
    Struct(
        "kvm_userspace_memory_region2",
        "6.8",
        """struct kvm_userspace_memory_region2 {
    __u32 slot, flags;
    __u64 guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset;
    __u32 guest_memfd, pad1;
    __u64 pad2[14];
};""",
    ),
    Struct(
        "kvm_memory_attributes",
        "6.8",
        "struct kvm_memory_attributes { __u64 address, size, attributes, flags; };",
    ),
    Struct(
        "kvm_create_guest_memfd",
        "6.8",
        "struct kvm_create_guest_memfd { __u64 size, flags, reserved[6]; };",
    ),
    Struct(
        "kvm_pre_fault_memory",
        "6.11",
        "struct kvm_pre_fault_memory { __u64 gpa, size, flags, padding[5]; };",
    ),
)

CONSTANTS: tuple[Constant, ...] = _constants("""
    Linux 5.8
    KVM_ASYNC_PF_VEC_MASK                   0xff

    Linux 5.15
    KVM_GUESTDBG_BLOCKIRQ                   0x00100000
    KVM_STATS_TYPE_LINEAR_HIST              (3 << KVM_STATS_TYPE_SHIFT)
    KVM_STATS_TYPE_LOG_HIST                 (4 << KVM_STATS_TYPE_SHIFT)

    Linux 5.16
    KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM        206
    KVM_CLOCK_REALTIME                      (1 << 2)
    KVM_CLOCK_HOST_TSC                      (1 << 3)
    KVM_VCPU_TSC_CTRL                       0
    KVM_VCPU_TSC_OFFSET                     0

    Linux 5.17
    KVM_CAP_VM_GPA_BITS                     207
    KVM_CAP_XSAVE2                          208
    KVM_CAP_SYS_ATTRIBUTES                  209
    KVM_GET_XSAVE2                          _IOR(KVMIO, 0xcf, struct kvm_xsave)
    KVM_IRQ_ROUTING_XEN_EVTCHN              5
    KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL  ((__u32)-1)
    KVM_X86_XCOMP_GUEST_SUPP                0
    KVM_XEN_HVM_CONFIG_EVTCHN_2LEVEL        (1 << 4)

    Linux 5.18
    KVM_CAP_PMU_CAPABILITY                  212
    KVM_CAP_DISABLE_QUIRKS2                 213
    KVM_CAP_VM_TSC_CONTROL                  214
    KVM_CAP_SYSTEM_EVENT_DATA               215
    KVM_PMU_CAP_DISABLE                     (1 << 0)

    Linux 5.19
    KVM_SYSTEM_EVENT_WAKEUP                 4
    KVM_SYSTEM_EVENT_SUSPEND                5
    KVM_SYSTEM_EVENT_SEV_TERM               6
    KVM_MP_STATE_SUSPENDED                  10
    KVM_X86_QUIRK_FIX_HYPERCALL_INSN        (1 << 5)
    KVM_XEN_HVM_CONFIG_EVTCHN_SEND          (1 << 5)
    KVM_XEN_HVM_EVTCHN_SEND                 _IOW(KVMIO, 0xd0, struct kvm_irq_routing_xen_evtchn)
    KVM_XEN_ATTR_TYPE_EVTCHN                3
    KVM_XEN_ATTR_TYPE_XEN_VERSION           4
    KVM_XEN_EVTCHN_DEASSIGN                 (1 << 0)
    KVM_XEN_EVTCHN_UPDATE                   (1 << 1)
    KVM_XEN_EVTCHN_RESET                    (1 << 2)
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID          6
    KVM_XEN_VCPU_ATTR_TYPE_TIMER            7
    KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR    8

    Linux 6.0
    KVM_CAP_X86_TRIPLE_FAULT_EVENT          218
    KVM_CAP_X86_NOTIFY_VMEXIT               219
    KVM_CAP_VM_DISABLE_NX_HUGE_PAGES        220
    KVM_EXIT_NOTIFY                         37
    KVM_NOTIFY_CONTEXT_INVALID              (1 << 0)
    KVM_PIT_FLAGS_SPEAKER_DATA_ON           (1 << 1)
    KVM_STATS_UNIT_BOOLEAN                  (4 << KVM_STATS_UNIT_SHIFT)
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT        0x20
    KVM_X86_NOTIFY_VMEXIT_ENABLED           (1ULL << 0)
    KVM_X86_NOTIFY_VMEXIT_USER              (1ULL << 1)
    KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS     (1 << 6)

    Linux 6.1
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL          223

    Linux 6.2
    KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP      225
    KVM_MSR_EXIT_REASON_VALID_MASK          7
    KVM_MSR_FILTER_RANGE_VALID_MASK         3
    KVM_MSR_FILTER_VALID_MASK               1
    KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG  5
    KVM_XEN_HVM_CONFIG_RUNSTATE_UPDATE_FLAG (1 << 6)
    KVM_XEN_INVALID_GPA                     ((__u64)-1)
    KVM_XEN_INVALID_GFN                     ((__u64)-1)

    Linux 6.3
    KVM_CAP_PMU_EVENT_MASKED_EVENTS         226
    KVM_PMU_EVENT_FLAG_MASKED_EVENTS        (1 << 0)
    KVM_PMU_EVENT_FLAGS_VALID_MASK          (1 << 0)
    KVM_PMU_MASKED_ENTRY_EVENT_SELECT       0xf000000ffULL
    KVM_PMU_MASKED_ENTRY_UMASK_MASK         (0xffULL << 56)
    KVM_PMU_MASKED_ENTRY_UMASK_MATCH        (0xffULL << 8)
    KVM_PMU_MASKED_ENTRY_EXCLUDE            (1ULL << 55)
    KVM_PMU_MASKED_ENTRY_UMASK_MASK_SHIFT   56

    Linux 6.4
    KVM_CAP_COUNTER_OFFSET                  227
    KVM_EXIT_HYPERCALL_LONG_MODE            (1 << 0)

    Linux 6.6
    KVM_DEV_VFIO_FILE                       1
    KVM_DEV_VFIO_FILE_ADD                   1
    KVM_DEV_VFIO_FILE_DEL                   2

    Linux 6.8
    KVM_CAP_USER_MEMORY2                    231
    KVM_CAP_MEMORY_FAULT_INFO               232
    KVM_CAP_MEMORY_ATTRIBUTES               233
    KVM_CAP_GUEST_MEMFD                     234
    KVM_CAP_VM_TYPES                        235
    KVM_SET_USER_MEMORY_REGION2             _IOW(KVMIO, 0x49, struct kvm_userspace_memory_region2)
    KVM_SET_MEMORY_ATTRIBUTES               _IOW(KVMIO, 0xd2, struct kvm_memory_attributes)
    KVM_CREATE_GUEST_MEMFD                  _IOWR(KVMIO, 0xd4, struct kvm_create_guest_memfd)
    KVM_EXIT_MEMORY_FAULT                   39
    KVM_MEMORY_EXIT_FLAG_PRIVATE            (1ULL << 3)
    KVM_MEMORY_ATTRIBUTE_PRIVATE            (1ULL << 3)
    KVM_MEM_GUEST_MEMFD                     (1UL << 2)
    KVM_X86_DEFAULT_VM                      0
    KVM_X86_SW_PROTECTED_VM                 1
    KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE (1 << 7)

    Linux 6.9
    KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA       6
    KVM_XEN_HVM_CONFIG_SHARED_INFO_HVA      (1 << 8)
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA    9

    Linux 6.10
    KVM_SEV_INIT2                           22
    KVM_X86_GRP_SEV                         1
    KVM_X86_GRP_SYSTEM                      0
    KVM_X86_SEV_VMSA_FEATURES               0
    KVM_X86_SEV_VM                          2
    KVM_X86_SEV_ES_VM                       3

    Linux 6.11
    KVM_CAP_PRE_FAULT_MEMORY                236
    KVM_CAP_X86_APIC_BUS_CYCLES_NS          237
    KVM_CAP_X86_GUEST_MODE                  238
    KVM_PRE_FAULT_MEMORY                    _IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory)
    KVM_RUN_X86_GUEST_MODE                  (1 << 2)
    KVM_SEV_SNP_LAUNCH_START                100
    KVM_SEV_SNP_LAUNCH_UPDATE               101
    KVM_SEV_SNP_LAUNCH_FINISH               102
    KVM_SEV_SNP_PAGE_TYPE_NORMAL            1
    KVM_SEV_SNP_PAGE_TYPE_ZERO              3
    KVM_SEV_SNP_PAGE_TYPE_UNMEASURED        4
    KVM_SEV_SNP_PAGE_TYPE_SECRETS           5
    KVM_SEV_SNP_PAGE_TYPE_CPUID             6
    KVM_SEV_SNP_ID_BLOCK_SIZE               0x60
    KVM_SEV_SNP_ID_AUTH_SIZE                0x1000
    KVM_SEV_SNP_FINISH_DATA_SIZE            0x20
    KVM_X86_SNP_VM                          4

    Linux 6.12
    KVM_X86_QUIRK_SLOT_ZAP_ALL              (1 << 7)

    Linux 6.13
    KVM_X86_QUIRK_STUFF_FEATURE_MSRS        (1 << 8)

    Linux 6.15
    KVM_XEN_MSR_MIN_INDEX                   0x40000000u
    KVM_XEN_MSR_MAX_INDEX                   0x4fffffffu

    Linux 6.16
    KVM_EXIT_TDX                            40
    KVM_SEV_PAGE_TYPE_INVALID               0
    KVM_SYSTEM_EVENT_TDX_FATAL              7
    KVM_TDX_CAPABILITIES                    0
    KVM_TDX_INIT_VM                         1
    KVM_TDX_INIT_VCPU                       2
    KVM_TDX_INIT_MEM_REGION                 3
    KVM_TDX_FINALIZE_VM                     4
    KVM_TDX_GET_CPUID                       5
    KVM_TDX_MEASURE_MEMORY_REGION           (1 << 0)
    KVM_X86_TDX_VM                          5
    KVM_X86_QUIRK_IGNORE_GUEST_PAT          (1 << 9)

    Linux 6.17
    KVM_X86_DISABLE_EXITS_APERFMPERF        (1 << 4)

    Linux 6.18
    KVM_CAP_GUEST_MEMFD_FLAGS               244
    GUEST_MEMFD_FLAG_MMAP                   (1ULL << 0)
    GUEST_MEMFD_FLAG_INIT_SHARED            (1ULL << 1)
    KVM_REG_GUEST_SSP                       0
    KVM_X86_REG_TYPE_MSR                    2
    KVM_X86_REG_TYPE_KVM                    3

    Linux 6.19
    KVM_X86_SNP_POLICY_BITS                 1

    Linux 7.0
    KVM_EXIT_SNP_REQ_CERTS                  43
    KVM_SEV_SNP_ENABLE_REQ_CERTS            103
    KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST  (1ULL << 2)
    KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST (1ULL << 3)
    KVM_X86_QUIRK_VMCS12_ALLOW_FREEZE_IN_SMM  (1 << 10)
    KVM_X86_SEV_SNP_REQ_CERTS               2

    Linux 7.2
    KVM_X86_QUIRK_NESTED_SVM_SHARED_PAT     (1 << 11)
""")
