"""What of csrc/ is written against CPython itself: it runs on every exit that Python serves."""

from collections.abc import Callable
from typing import Any, final

class _Access:
    """One access of the guest, or one item of a string instruction: a value, which may be kept.

    Attributes:
        value: what the guest writes, unsigned; 0 for a read.
        offset: bytes from the first address of the claimed range.
        size: width in bytes: 1, 2, 4; MMIO any of 1..8.
        is_write: True for OUT and stores, False for IN and loads, which the handler answers.
        data: the written bytes, little endian; b"" for a read.
    """

    def __init__(
        self,
        address: int,
        size: int = 1,
        value: int = 0,
        is_write: bool = False,
        offset: int = 0,
    ) -> None: ...
    @property
    def value(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_write(self) -> bool: ...
    @property
    def data(self) -> bytes: ...

@final
class PioAccess(_Access):
    """An access to an I/O port."""

    @property
    def port(self) -> int:
        """The port, 0..0xffff."""

@final
class MmioAccess(_Access):
    """An access to guest-physical memory that is not RAM."""

    @property
    def gpa(self) -> int:
        """The guest-physical address."""

def run(
    vcpu: int,
    handlers: list[Callable[[Any], int | None]],
    call: Callable[[Callable[[Any], int | None], Any], int | None] | None,
    /,
) -> int:
    """Run the ``struct pykvm_vcpu`` at an address until an outcome other than PYKVM_ACCESS.

    Its accesses are served by ``handlers[slot](access)`` or, if ``call`` is not None,
    ``call(handlers[slot], access)``. What that raises comes through.
    """

def last_access(vcpu: int, /) -> PioAccess | MmioAccess:
    """The access that the ``struct pykvm_vcpu`` at an address made."""

class GeneralRegisters:
    """The general registers of a vCPU, RIP and RFLAGS, whole and in parts; base of ``Cpu``.

    What is read or written while KVM does not keep them in the run page calls ``load_regs()``.

    Attributes:
        entered: whether ``enter()`` or a register write made it ready to run.
        interrupts: RFLAGS.IF; the other flags have their own names.
    """

    entered: bool
    rax: int
    eax: int
    ax: int
    al: int
    rbx: int
    ebx: int
    bx: int
    bl: int
    rcx: int
    ecx: int
    cx: int
    cl: int
    rdx: int
    edx: int
    dx: int
    dl: int
    rsi: int
    esi: int
    si: int
    sil: int
    rdi: int
    edi: int
    di: int
    dil: int
    rsp: int
    esp: int
    sp: int
    spl: int
    rbp: int
    ebp: int
    bp: int
    bpl: int
    r8: int
    r8d: int
    r8w: int
    r8b: int
    r9: int
    r9d: int
    r9w: int
    r9b: int
    r10: int
    r10d: int
    r10w: int
    r10b: int
    r11: int
    r11d: int
    r11w: int
    r11b: int
    r12: int
    r12d: int
    r12w: int
    r12b: int
    r13: int
    r13d: int
    r13w: int
    r13b: int
    r14: int
    r14d: int
    r14w: int
    r14b: int
    r15: int
    r15d: int
    r15w: int
    r15b: int
    ah: int
    bh: int
    ch: int
    dh: int
    rip: int
    eip: int
    ip: int
    rflags: int
    eflags: int
    flags: int
    cf: bool
    pf: bool
    af: bool
    zf: bool
    sf: bool
    tf: bool
    interrupts: bool
    df: bool
    of: bool

    def bind(self, vcpu: int, /) -> None:
        """Belong to the ``struct pykvm_vcpu`` at an address, or with 0 to none any more."""
