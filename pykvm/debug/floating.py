"""x87 and SSE registers of a vCPU that stands, and all that belongs to them.

KVM_SET_FPU alone is not enough: as long as the guest has used neither, their bits in XSTATE_BV are
clear, and it would begin with their initial state whatever was set. So they go in with the XSAVE
area (SDM Vol. 1, 13.4), where KVM has that.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.kvm import Vcpu

_LEGACY = struct.Struct("<HHBxHQQI")
"""FCW, FSW, abridged FTW, FOP, FIP, FDP, MXCSR: the start of the area."""
_ST, _XMM, _XSTATE_BV = 32, 160, 512
_X87_AND_SSE = 3


def take(vcpu: Vcpu) -> Any:
    """All that :func:`put` puts back."""
    if vcpu.vm.check_extension("KVM_CAP_XSAVE2"):
        return vcpu.get_xsave2()
    return vcpu.get_xsave() if _has_xsave(vcpu) else vcpu.get_fpu()


def put(vcpu: Vcpu, taken: Any) -> None:
    """Put back what was taken."""
    (vcpu.set_xsave if _has_xsave(vcpu) else vcpu.set_fpu)(taken)


def set_fpu(vcpu: Vcpu, fpu: Any) -> None:
    """Have a ``struct kvm_fpu *`` for x87 and SSE, and the rest as it is.

    Raises:
        KvmError: MXCSR has a bit that there is not.
    """
    if not _has_xsave(vcpu):
        vcpu.set_fpu(fpu)
        return
    area = take(vcpu)
    control = _LEGACY.pack(
        fpu.fcw, fpu.fsw, fpu.ftwx, fpu.last_opcode, fpu.last_ip, fpu.last_dp, fpu.mxcsr
    )
    _store(area, 0, control)
    for number in range(8):
        _store(area, _ST + 16 * number, bytes(fpu.fpr[number]))
    for number in range(16):
        _store(area, _XMM + 16 * number, bytes(fpu.xmm[number]))
    area.region[_XSTATE_BV // 4] |= _X87_AND_SSE
    vcpu.set_xsave(area)


def _store(area: Any, at: int, data: bytes) -> None:
    for n, (word,) in enumerate(struct.iter_unpack("<I", data)):
        area.region[at // 4 + n] = word


def _has_xsave(vcpu: Vcpu) -> bool:
    return bool(vcpu.vm.check_extension("KVM_CAP_XSAVE"))
