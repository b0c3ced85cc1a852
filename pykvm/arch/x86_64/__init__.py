"""x86-64: descriptors, page tables, registers, entry modes, and why a state is refused.

Nothing here talks to KVM. "sregs" and "regs" are any objects with the attributes of ``struct
kvm_sregs`` and ``struct kvm_regs`` (the cffi structs, or ``regs.Sregs`` and ``regs.Regs``), and
"memory" is anything with ``memory[a:b]`` in bytes (``GuestMemory``, or a plain ``bytearray``).

- ``regs``      names of registers and of their bits, sub-registers, readable dumps
- ``msrs``      names of model-specific registers
- ``cpuid``     what a list of CPUID entries offers
- ``segments``  segment descriptors and gates, to and from bytes
- ``tables``    GDT, IDT and TSS
- ``paging``    building page tables
- ``walk``      translating an address, step by step
- ``layout``    where ``modes`` puts what it builds
- ``modes``     real16, prot32 and long64, ready to run
- ``rules``     the consistency rules of VMX, SVM and KVM over a state
- ``explain``   what went wrong, in words: a refusal, a failed entry, a shutdown
"""
