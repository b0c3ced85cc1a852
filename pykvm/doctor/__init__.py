"""Can KVM be used here, if not why, and if so how well: ``pykvm doctor`` as a library.

::

    report = pykvm.doctor.examine()
    if not report.usable:
        print(report.problem.what, *report.problem.remedies, sep="\\n")
    print(report.ring0.verdict, report.costs["pio_c"].ns)

Opening the device and running guests decide; processor flags and module names only explain.

``Report.to_dict()`` is what ``pykvm doctor --json`` prints, which adds ``pykvm``, its version. The
schema, to which later versions only add::

    schema        1
    device        path of the KVM device
    usable        true if a guest ran
    problem       null, or {code, what, evidence: [text], remedies: [text]}; the codes are those of
                  pykvm.doctor.Problem
    host          {kernel, architecture, processor, processors, virtualization: "vmx"|"svm"|"",
                  virtual_machine: bool, container: kind or "", page_size, huge_pages:
                  {transparent, pools: {"2M": {total, free}}}, available_memory: bytes,
                  assembler: version or "", python}
    backend       {name, modules: [name], nested: bool or null, says: text}, or null
    capabilities  {present: {KVM_CAP_*: {value, means}}, missing: {KVM_CAP_*: {means}}}, or null
    limits        {recommended_vcpus, vcpus, vcpu_id, memory_slots}, or null; the most there may
                  be, vcpu_id one above the largest
    ring0         {verdict: "native"|"emulated", ring0_ns, ring3_ns, ratio}, or null; ns an
                  instruction
    linux         {boots: bool or null, why}: whether a stock Linux kernel can be expected to boot
    costs         {pio_c, pio_python, pio_ring3, ioctl, machine, machine_irqchip:
                  {what, ns, low, high, per_second}}; median, fastest and slowest sample
    advice        [text]: what to know or do on this machine
    failed        {probe: error}: looks and measurements that did not work; their values are null,
                  and absent from costs
    seconds       what the examination took
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from . import host, measure
from .access import Problem, diagnose
from .host import Tree
from .measure import Ring0, Timing

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    T = TypeVar("T")

__all__ = [
    "Backend",
    "Capability",
    "Problem",
    "Report",
    "Ring0",
    "Timing",
    "backend",
    "diagnose",
    "examine",
]

SCHEMA = 1


@dataclass(frozen=True)
class Backend:
    """What stands behind the KVM device.

    Attributes:
        name: ``"kvm-intel"``, ``"kvm-amd"``, ``"kvm-pvm"``, … or ``"unknown"``; for people.
        modules: the kernel modules that were seen.
        nested: whether guests could run KVM themselves; None where the module does not say.
        says: what KVM itself said that fits, in words.
    """

    name: str
    modules: tuple[str, ...]
    nested: bool | None
    says: str


@dataclass(frozen=True)
class Capability:
    """One KVM_CAP_*: its value (0: missing) and what it means in words."""

    name: str
    value: int
    means: str


@dataclass
class Report:
    """What :func:`examine` found. What could not be found out is None, and in ``failed``.

    Attributes:
        device: path of the KVM device.
        problem: why KVM cannot be used, or None where it can.
        host: facts by name, see the schema in :mod:`pykvm.doctor`.
        backend, ring0: see there.
        capabilities: all that x86 can have, present or not; [] if KVM cannot be used.
        limits: numbers by name.
        costs: timings by name.
        advice: what to know or do on this machine.
        failed: errors by the name of the probe.
        seconds: how long the examination took.
    """

    device: str
    problem: Problem | None = None
    host: dict[str, Any] = field(default_factory=dict)
    backend: Backend | None = None
    capabilities: list[Capability] = field(default_factory=list)
    limits: dict[str, int] | None = None
    ring0: Ring0 | None = None
    costs: dict[str, Timing] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether KVM can be used here: a guest ran."""
        return self.problem is None

    @property
    def linux(self) -> tuple[bool | None, str]:
        """Whether a stock Linux kernel can be expected to boot here, and why."""
        if not self.usable:
            return False, "KVM cannot be used"
        if self.ring0 is None:
            return None, "it depends on ring 0, which could not be measured"
        if self.ring0.verdict == "native":
            return True, "ring 0, where a kernel runs, is native"
        return False, (
            "ring 0, where a kernel runs, is emulated: too slow by far, and not every instruction"
            " that a kernel uses is known to the emulator"
        )

    @property
    def advice(self) -> list[str]:
        """What to know or do on this machine, in sentences; the remedies where KVM is unusable."""
        advice = list(self.problem.remedies) if self.problem else []
        if self.ring0 is not None and self.ring0.verdict == "emulated":
            advice.append(
                "ring 0 is emulated: run what computes in ring 3, "
                'cpu.enter("long64", entry=…, ring=3, iopl=3), and keep ring 0 to integer code'
            )
        ports = [self.costs.get(name) for name in ("pio_c", "pio_ring3")]
        if ports[0] and ports[1] and ports[1].low > 2 * ports[0].low:
            advice.append(
                f"an exit from ring 3 costs {ports[1].low / ports[0].low:.1f} times one from"
                " ring 0: compute there, and let exits be few"
            )
        if self.host.get("assembler") == "":
            advice.append(
                "no assembler: pykvm.asm() and .S files need GNU binutils (apt install binutils);"
                " the shipped guests don't"
            )
        return advice

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON; the schema stands in :mod:`pykvm.doctor`."""
        present, missing = {}, {}
        for cap in self.capabilities:
            if cap.value:
                present[cap.name] = {"value": cap.value, "means": cap.means}
            else:
                missing[cap.name] = {"means": cap.means}
        boots, why = self.linux
        return {
            "schema": SCHEMA,
            "device": self.device,
            "usable": self.usable,
            "problem": asdict(self.problem) if self.problem else None,
            "host": self.host,
            "backend": asdict(self.backend) if self.backend else None,
            "capabilities": (
                {"present": present, "missing": missing} if self.capabilities else None
            ),
            "limits": self.limits,
            "ring0": asdict(self.ring0) if self.ring0 else None,
            "linux": {"boots": boots, "why": why},
            "costs": {
                name: {**asdict(timing), "per_second": timing.per_second}
                for name, timing in self.costs.items()
            },
            "advice": self.advice,
            "failed": self.failed,
            "seconds": self.seconds,
        }


def backend(root: str = "/") -> str:
    """The back end and the kernel in a line, found by looking only: ``"kvm-amd, Linux 6.1.0"``."""
    tree = Tree(root)
    return f"{host.back_end(tree)}, Linux {host.FACTS['kernel'](tree)}"


def examine(path: str = "/dev/kvm", *, root: str = "/", measured: bool = True) -> Report:
    """Look at this host and its KVM, and measure it. Takes less than a second; never raises.

    Args:
        path: the KVM device.
        root: where /proc and /sys are.
        measured: whether to measure ring 0 and the costs; else only look.
    """
    start = time.perf_counter()
    tree = Tree(root)
    report = Report(path)

    def probe(name: str, look: Callable[..., T], *args: object) -> T | None:
        """Look, on its own: what goes wrong is written down and harms no other probe."""
        try:
            return look(*args)
        except Exception as error:
            report.failed[name] = f"{type(error).__name__}: {error}"
            return None

    for name, fact in host.FACTS.items():
        report.host[name] = probe(f"host.{name}", fact, tree)
    try:
        report.problem = diagnose(path, tree)
    except Exception as error:
        what = f"an examination of {path} failed: {type(error).__name__}: {error}"
        report.problem = Problem("refused", what)
    if report.usable:
        report.backend = probe("backend", _back_end, path, tree)
        report.capabilities = probe("capabilities", _capabilities, path) or []
        report.limits = probe("limits", _limits, path)
        if measured:
            report.ring0 = probe("ring0", measure.ring0, path)
            for name, cost in measure.COSTS.items():
                timing = probe(f"costs.{name}", cost, path)
                if timing is not None:
                    report.costs[name] = timing
    report.seconds = time.perf_counter() - start
    return report


def _back_end(path: str, tree: Tree) -> Backend:
    from pykvm.kvm import Kvm

    with Kvm(path) as kvm:
        known = kvm.check_extension("KVM_CAP_GET_MSR_FEATURES")
        msrs = kvm.get_msr_feature_index_list() if known else []
    if host.VMX_BASIC in msrs:
        says = "it has the VMX feature MSRs of kvm-intel"
    elif host.AMD64_DE_CFG in msrs:
        says = "it has the feature MSR DE_CFG of kvm-amd"
    else:
        says = "it has the feature MSRs of neither VMX nor SVM"
    return Backend(host.back_end(tree, msrs), tuple(host.modules(tree)), host.nested(tree), says)


def _capabilities(path: str) -> list[Capability]:
    from pykvm.kvm import Kvm, caps

    with Kvm(path) as kvm, kvm.create_vm() as vm:
        return [
            Capability(name, value, caps.describe(name)) for name, value in caps.probe(vm).items()
        ]


def _limits(path: str) -> dict[str, int]:
    """What to assume where a capability is missing stands in api.rst 4.7 (KVM_CREATE_VCPU)."""
    from pykvm.kvm import Kvm

    with Kvm(path) as kvm:
        recommended = kvm.check_extension("KVM_CAP_NR_VCPUS") or 4
        most = kvm.check_extension("KVM_CAP_MAX_VCPUS") or recommended
        return {
            "recommended_vcpus": recommended,
            "vcpus": most,
            "vcpu_id": kvm.check_extension("KVM_CAP_MAX_VCPU_ID") or most,
            "memory_slots": kvm.check_extension("KVM_CAP_NR_MEMSLOTS") or 32,
        }
