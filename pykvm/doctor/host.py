"""What can be seen of this host by looking: files of /proc and /sys, and tools on PATH."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

VMX_BASIC = 0x480
"""IA32_VMX_BASIC (SDM Vol. 3D, A.1): a feature MSR of kvm-intel that lets guests nest."""
AMD64_DE_CFG = 0xC0011029
"""DE_CFG (a feature MSR of kvm-amd: whether LFENCE serialises)."""

_VENDORS = {
    "kvm_intel": ("GenuineIntel", "CentaurHauls", "  Shanghai  "),
    "kvm_amd": ("AuthenticAMD", "HygonGenuine"),
}


class Tree:
    """Files below a root: ``/``, or a folder that plays it in a test.

    What is absent or may not be read is empty: every look here is a hint, never a need.
    """

    def __init__(self, root: str = "/") -> None:
        self.root = root

    def _at(self, path: str) -> str:
        return os.path.join(self.root, path.lstrip("/"))

    def text(self, path: str) -> str:
        """The file's text, or ""."""
        try:
            with open(self._at(path), encoding="utf-8", errors="replace") as file:
                return file.read()
        except OSError:
            return ""

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder."""
        return os.path.exists(self._at(path))

    def names(self, path: str) -> list[str]:
        """What is in a folder, sorted; [] where there is none."""
        try:
            return sorted(os.listdir(self._at(path)))
        except OSError:
            return []


# ---- the processor -----------------------------------------------------------------------------


def cpuinfo(tree: Tree, key: str) -> str:
    """A line of /proc/cpuinfo about the first processor: ``cpuinfo(tree, "vendor_id")``."""
    for line in tree.text("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def flags(tree: Tree) -> frozenset[str]:
    """The processor's feature flags as Linux names them: ``vmx``, ``svm``, ``hypervisor``."""
    return frozenset(cpuinfo(tree, "flags").split())


# ---- where we run ------------------------------------------------------------------------------


def container(tree: Tree) -> str:
    """The kind of container this process is in, ``"docker"`` or the like; "" if none is seen."""
    groups = tree.text("/proc/1/cgroup") + tree.text("/proc/self/cgroup")
    if "kubepods" in groups or tree.exists("/var/run/secrets/kubernetes.io"):
        return "kubernetes"
    if tree.exists("/.dockerenv") or "/docker" in groups:
        return "docker"
    if tree.exists("/run/.containerenv") or "libpod" in groups:
        return "podman"
    for kind in ("containerd", "lxc", "garden"):
        if kind in groups:
            return kind
    return tree.text("/run/systemd/container").strip()  # systemd-nspawn and others that tell it


def kvm_in_kernel(tree: Tree) -> bool:
    """Whether this kernel has a KVM that registered its device, node or not (/proc/misc)."""
    return any(line.split()[1:] == ["kvm"] for line in tree.text("/proc/misc").splitlines())


def nested(tree: Tree) -> bool | None:
    """Whether guests of this host's KVM could run KVM themselves; None where it does not say."""
    for module in ("kvm_intel", "kvm_amd"):
        value = tree.text(f"/sys/module/{module}/parameters/nested").strip()
        if value:
            return value in ("Y", "1")
    return None


# ---- the back end ------------------------------------------------------------------------------


def modules(tree: Tree) -> list[str]:
    """The modules that may stand behind /dev/kvm: ``kvm_intel``, ``kvm_amd``, ``kvm_pvm``, …

    Those that hold ``kvm`` if they were loaded; else, as for those built into the kernel, every
    one that shows parameters.
    """
    seen = [name for name in tree.names("/sys/module") if name.startswith("kvm_")]
    holding = [name for name in tree.names("/sys/module/kvm/holders") if name in seen]
    return holding or seen


def back_end(tree: Tree, feature_msrs: Iterable[int] | None = None) -> str:
    """Which back end KVM has: ``"kvm-intel"``, ``"kvm-amd"``, ``"kvm-pvm"``, …, or ``"unknown"``.

    For people to read. What a KVM can do is a question for KVM_CHECK_EXTENSION, not for its name.

    Args:
        tree: where /sys is.
        feature_msrs: what KVM_GET_MSR_FEATURE_INDEX_LIST says, to choose among several modules
            (a kernel with all of them built in) or where /sys shows none.
    """
    candidates = modules(tree)
    if len(candidates) != 1:
        said = set(feature_msrs or ())
        told = [
            name
            for name, msr in (("kvm_intel", VMX_BASIC), ("kvm_amd", AMD64_DE_CFG))
            if msr in said and (name in candidates or not candidates)
        ]
        vendor = cpuinfo(tree, "vendor_id")
        fits = [name for name in candidates if vendor in _VENDORS.get(name, (vendor,))]
        candidates = told or fits
    return " or ".join(name.replace("_", "-") for name in candidates) or "unknown"


# ---- facts -------------------------------------------------------------------------------------


def processor(tree: Tree) -> str:
    """The processor's name."""
    return cpuinfo(tree, "model name") or platform.machine()


def virtualization(tree: Tree) -> str:
    """``"vmx"`` or ``"svm"`` if the processor shows it, else "". A hint: kvm-pvm needs neither."""
    return next((flag for flag in ("vmx", "svm") if flag in flags(tree)), "")


def huge_pages(tree: Tree) -> dict[str, Any]:
    """``{"transparent": "always"|"madvise"|"never"|"", "pools": {"2M": {"total", "free"}, …}}``."""
    from pykvm.memory.units import format_size

    chosen = tree.text("/sys/kernel/mm/transparent_hugepage/enabled")
    pools = {}
    folder = "/sys/kernel/mm/hugepages"
    for name in tree.names(folder):
        size = int(name.removeprefix("hugepages-").removesuffix("kB")) << 10
        total, free = (
            int(tree.text(f"{folder}/{name}/{what}") or 0)
            for what in ("nr_hugepages", "free_hugepages")
        )
        pools[format_size(size)] = {"total": total, "free": free}
    return {"transparent": chosen.partition("[")[2].partition("]")[0], "pools": pools}


def assembler(tree: Tree) -> str:
    """The first line of ``as --version``, or "" where binutils (``as`` and ``ld``) is missing."""
    import shutil
    import subprocess

    if shutil.which("as") is None or shutil.which("ld") is None:
        return ""
    done = subprocess.run(
        ["as", "--version"], capture_output=True, text=True, timeout=5, check=True
    )
    return done.stdout.partition("\n")[0]


def memory(tree: Tree) -> int | None:
    """Bytes of memory that programs could still have (MemAvailable), or None."""
    for line in tree.text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


FACTS: dict[str, Callable[[Tree], Any]] = {
    "kernel": lambda tree: os.uname().release,
    "architecture": lambda tree: os.uname().machine,
    "processor": processor,
    "processors": lambda tree: len(os.sched_getaffinity(0)),
    "virtualization": virtualization,
    "virtual_machine": lambda tree: "hypervisor" in flags(tree),
    "container": container,
    "page_size": lambda tree: os.sysconf("SC_PAGE_SIZE"),
    "huge_pages": huge_pages,
    "available_memory": memory,
    "assembler": assembler,
    "python": lambda tree: platform.python_version(),
}
"""What :func:`pykvm.doctor.examine` tells of the host, each by a look of its own."""
