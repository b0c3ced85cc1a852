"""Whether a KVM can run a stock kernel. Loaded when a boot makes somebody doubt it.

A kernel lives in ring 0. Some KVMs (kvm-pvm) have ring 0 executed by KVM's instruction emulator,
which is thousands of times slower than the processor and does not know every instruction that a
stock kernel uses. No capability tells; a guest of two instructions does.
"""

from __future__ import annotations

from pykvm import result as reasons
from pykvm.errors import KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.runs import Runs

PROBE = "LOCK CMPXCHG16B"
"""What no KVM's emulator knows, and every kernel with the SLUB allocator executes as it starts."""
_PROBE_CODE = bytes.fromhex("f0480fc70c24 f4")
"""``lock cmpxchg16b [rsp]; hlt``."""
_COUNT_CODE = bytes.fromhex("48ffc1 ebfb")
"""``l: inc rcx; jmp l``"""
_AT, _STACK = 0x8000, 0x7000

REMEDY = (
    "use a machine whose KVM runs ring 0 on the processor (kvm_intel, kvm_amd; with nested"
    " virtualization if it is virtual): `pykvm doctor` says beforehand, at “stock Linux”"
)

_known: dict[str, bool] = {}
"""By device path: what the probe found."""


def ring0_is_emulated(path: str = "/dev/kvm") -> bool:
    """Whether this KVM executes ring 0 in an emulator that cannot run a stock kernel.

    Probed, by running one instruction there; False also where the probe itself fails. Takes some
    milliseconds the first time.
    """
    if path not in _known:
        from pykvm.machine import Machine

        try:
            with Machine("64K", path=path) as m:
                m.load(_PROBE_CODE, at=_AT)
                m.cpu.enter("long64", entry=_AT, stack=_STACK)
                found = m.run(timeout=1.0).reason
        except KvmError:
            return False
        _known[path] = found == reasons.INTERNAL_ERROR
    return _known[path]


def obstacle(m: Runs) -> str:
    """Why the stock kernel that ``m`` has booted cannot run here, and what to do; or ""."""
    path = m.kvm.path
    if m.pc is None or not m.pc.is_linux or not ring0_is_emulated(path):
        return ""
    return (
        f"this KVM cannot run stock kernels: ring 0, where they run, is emulated{_pace(path)}, and"
        f" {PROBE}, which they all execute as they start, is one of the instructions it does not"
        f" have (probed)\n  what to do: {REMEDY}"
    )


def _pace(path: str) -> str:
    try:
        times = [_ns_an_instruction(ring, path) for ring in (0, 3)]
    except (KvmError, ZeroDivisionError):
        return ""
    return f" ({times[0]:,.0f} ns an instruction; in ring 3 {times[1]:.2g} ns)"


def _ns_an_instruction(ring: int, path: str) -> float:
    """Roughly, by a loop of two; `pykvm doctor` does it with more care."""
    from pykvm.machine import Machine

    with Machine(path=path) as m:
        m.load(_COUNT_CODE, at=_AT)
        m.cpu.enter("long64", entry=_AT, ring=ring)
        times = []
        for _ in range(5):  # the least is the truest: whatever else the host does only adds
            before = m.cpu.rcx
            seconds = m.run(timeout=0.005).seconds
            times.append(seconds * 1e9 / (2 * (m.cpu.rcx - before)))
        return min(times)
