"""The ioctls of linux/kvm.h that have no method here, each with its reason.

Together with the methods of :class:`Kvm`, :class:`Vm`, :class:`Vcpu` and :class:`Device` this
covers the header: a test holds that each ioctl is in one of the two, and in one only.
"""

from __future__ import annotations

_REASONS: dict[str, str] = {
    # x86, but not offered
    "Xen guests: an emulation of another hypervisor's interface, which no guest here needs": """
        KVM_XEN_HVM_CONFIG KVM_XEN_HVM_GET_ATTR KVM_XEN_HVM_SET_ATTR KVM_XEN_HVM_EVTCHN_SEND
        KVM_XEN_VCPU_GET_ATTR KVM_XEN_VCPU_SET_ATTR
    """,
    "Hyper-V's event connections: of use only to a Windows guest with VMBus devices": """
        KVM_HYPERV_EVENTFD
    """,
    "confidential guests (SEV, TDX): their memory is closed to this process, which is what this "
    "package is for opening": """
        KVM_MEMORY_ENCRYPT_OP KVM_MEMORY_ENCRYPT_REG_REGION KVM_MEMORY_ENCRYPT_UNREG_REGION
    """,
    "replaced by KVM_SET_CPUID2, which knows sub-leaves": """
        KVM_SET_CPUID
    """,
    "replaced by KVM_CREATE_PIT2, KVM_GET_PIT2 and KVM_SET_PIT2": """
        KVM_CREATE_PIT KVM_GET_PIT KVM_SET_PIT
    """,
    # removed from every kernel that speaks API version 12 as we need it
    "removed from KVM: replaced by KVM_SET_USER_MEMORY_REGION": """
        KVM_SET_MEMORY_REGION KVM_SET_MEMORY_ALIAS
    """,
    "removed from KVM: replaced by the kernel's trace events": """
        KVM_TRACE_ENABLE KVM_TRACE_PAUSE KVM_TRACE_DISABLE
    """,
    "removed from KVM: replaced by KVM_SET_GUEST_DEBUG": """
        KVM_DEBUG_GUEST
    """,
    "removed from KVM: device assignment is VFIO's": """
        KVM_ASSIGN_PCI_DEVICE KVM_DEASSIGN_PCI_DEVICE KVM_ASSIGN_IRQ KVM_ASSIGN_DEV_IRQ
        KVM_DEASSIGN_DEV_IRQ KVM_ASSIGN_SET_MSIX_NR KVM_ASSIGN_SET_MSIX_ENTRY
        KVM_ASSIGN_SET_INTX_MASK
    """,
    # other architectures
    "not on x86: arm64": """
        KVM_ARM_SET_DEVICE_ADDR KVM_ARM_VCPU_INIT KVM_ARM_PREFERRED_TARGET KVM_ARM_VCPU_FINALIZE
        KVM_ARM_MTE_COPY_TAGS KVM_ARM_SET_COUNTER_OFFSET KVM_ARM_GET_REG_WRITABLE_MASKS
    """,
    "not on x86: powerpc": """
        KVM_PPC_GET_PVINFO KVM_PPC_GET_SMMU_INFO KVM_PPC_ALLOCATE_HTAB KVM_CREATE_SPAPR_TCE
        KVM_CREATE_SPAPR_TCE_64 KVM_ALLOCATE_RMA KVM_PPC_GET_HTAB_FD KVM_PPC_RTAS_DEFINE_TOKEN
        KVM_PPC_RESIZE_HPT_PREPARE KVM_PPC_RESIZE_HPT_COMMIT KVM_PPC_CONFIGURE_V3_MMU
        KVM_PPC_GET_RMMU_INFO KVM_PPC_GET_CPU_CHAR KVM_PPC_SVM_OFF KVM_DIRTY_TLB
    """,
    "not on x86: s390": """
        KVM_S390_ENABLE_SIE KVM_S390_UCAS_MAP KVM_S390_UCAS_UNMAP KVM_S390_VCPU_FAULT
        KVM_S390_INTERRUPT KVM_S390_STORE_STATUS KVM_S390_SET_INITIAL_PSW KVM_S390_INITIAL_RESET
        KVM_S390_MEM_OP KVM_S390_GET_SKEYS KVM_S390_SET_SKEYS KVM_S390_IRQ KVM_S390_SET_IRQ_STATE
        KVM_S390_GET_IRQ_STATE KVM_S390_GET_CMMA_BITS KVM_S390_SET_CMMA_BITS KVM_S390_NORMAL_RESET
        KVM_S390_CLEAR_RESET KVM_S390_PV_COMMAND KVM_S390_PV_CPU_COMMAND KVM_S390_ZPCI_OP
        KVM_S390_KEYOP
    """,
}

#: The reason of each excluded ioctl, by its name.
EXCLUSIONS: dict[str, str] = {
    name: reason for reason, names in _REASONS.items() for name in names.split()
}
