"""Can KVM be used here, and if not, why and what to do about it."""

from __future__ import annotations

import errno as _errno
import os
from dataclasses import dataclass

from pykvm.errors import CapabilityError, KvmError

from . import host
from .host import Tree

_HLT = b"\xf4"

DOCKER = "in Docker or Podman: start the container with --device {path}"
KUBERNETES = "in Kubernetes: give the pod the device, through a device plugin for {path}"


@dataclass(frozen=True)
class Problem:
    """Why KVM cannot be used.

    Attributes:
        code: a stable word. ``"no-device"``: KVM is in the kernel, its device node is not here;
            ``"no-module"``: no KVM module is loaded; ``"no-virtualization"``: and the processor
            shows none either; ``"permission"``; ``"container"``: a container may not open the
            device; ``"busy"``: another hypervisor has the processor; ``"not-kvm"``: the file is
            not a KVM; ``"limit"``: memory or file descriptors ran out; ``"forked"``; ``"refused"``:
            KVM refused something else; ``"run"``: a guest of one instruction did not run.
        what: what is wrong, in a sentence.
        evidence: what was seen that says so.
        remedies: what to do, most likely first.
    """

    code: str
    what: str
    evidence: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()


def diagnose(path: str = "/dev/kvm", tree: Tree | None = None) -> Problem | None:
    """Why KVM cannot be used here, or None after a guest of one instruction has run.

    Only opening the device and running decide; flags and modules are looked at to explain.

    Args:
        path: the KVM device.
        tree: where /proc and /sys are.
    """
    tree = tree or Tree()
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return _cannot_open(path, error.errno or 0, tree)
    try:
        return _run_one(path)
    except CapabilityError as error:
        return Problem(
            "not-kvm",
            str(error),
            (f"{path} could be opened",),
            (f"give the path of a KVM device instead of {path}",),
        )
    except KvmError as error:
        return _refused(error, path, tree)


def _run_one(path: str) -> Problem | None:
    from pykvm.machine import Machine
    from pykvm.result import HALTED

    with Machine(memory="64K", cpuid=None, path=path) as m:
        m.load(_HLT, at=0x8000)
        m.cpu.enter("real16", entry=0x8000)
        result = m.run(timeout=2.0)
    if result.reason == HALTED:
        return None
    return Problem(
        "run",
        f"a guest of one HLT instruction did not run: {result.reason}",
        tuple(str(result.error or result).splitlines()),
        ("this KVM is broken: look at the kernel's log (sudo dmesg)",),
    )


# ---- the device cannot be opened ---------------------------------------------------------------


def _cannot_open(path: str, errno: int, tree: Tree) -> Problem:
    name = f"{_errno.errorcode.get(errno, errno)} ({os.strerror(errno)})"
    if errno in (_errno.ENOENT, _errno.ENOTDIR):
        return _absent(path, f"there is no {path}", tree)
    if errno in (_errno.ENODEV, _errno.ENXIO):
        return _absent(path, f"no KVM stands behind {path}: {name}", tree)
    if errno == _errno.EACCES:
        return _not_permitted(path, name)
    if errno == _errno.EPERM:
        return Problem(
            "container",
            f"this process may not open {path}, whatever the file's mode says: {name}",
            _surroundings(tree),
            (
                *_for_container(path, tree),
                "under SELinux, AppArmor or seccomp: allow the device there",
            ),
        )
    if errno == _errno.EBUSY:
        return _busy(name, tree)
    if errno in (_errno.EMFILE, _errno.ENFILE):
        return _limit(f"{path} cannot be opened: {name}")
    if errno == _errno.EISDIR:
        return Problem("not-kvm", f"{path} is a folder", (), ("give the path of a KVM device",))
    return Problem("refused", f"{path} cannot be opened: {name}", _surroundings(tree))


def _absent(path: str, what: str, tree: Tree) -> Problem:
    """There is no device: KVM has none to offer, or just its node is missing."""
    evidence = list(_surroundings(tree))
    inside = _for_container(path, tree)
    if host.kvm_in_kernel(tree):
        evidence.append("the kernel does have KVM: /proc/misc lists it")
        node = f"make the node: sudo mknod {path} c 10 232, sudo chmod 660 {path}"
        return Problem("no-device", what, tuple(evidence), (*inside, node))
    evidence.append("no KVM is in the kernel: /proc/misc does not list it")
    shown = host.virtualization(tree)
    if shown:
        module = {"vmx": "kvm_intel", "svm": "kvm_amd"}[shown]
        return Problem(
            "no-module",
            f"{what}: the KVM module is not loaded",
            (*evidence, f"the processor shows {shown}"),
            (
                f"load it{' on the host' * bool(inside)}: sudo modprobe {module}",
                "if that fails: virtualization may be off in the firmware; see sudo dmesg",
                *inside,
            ),
        )
    evidence.append("the processor shows neither vmx nor svm")
    if "hypervisor" in host.flags(tree):
        return Problem(
            "no-virtualization",
            f"{what}: this machine is itself a virtual machine, without nested virtualization",
            tuple(evidence),
            (
                "switch nested virtualization on where this machine is run: with KVM load"
                " kvm_intel or kvm_amd with nested=1 there and give this machine the host's"
                " processor (-cpu host); clouds have it as a setting or a kind of machine",
                "or use a kernel with a KVM that needs none (kvm_pvm)",
                *inside,
            ),
        )
    return Problem(
        "no-virtualization",
        f"{what}: the processor offers no virtualization",
        tuple(evidence),
        (
            "switch it on in the firmware (called VT-x, VMX, AMD-V or SVM), then"
            " sudo modprobe kvm_intel or kvm_amd",
            *inside,
        ),
    )


def _not_permitted(path: str, name: str) -> Problem:
    evidence: tuple[str, ...] = ()
    group, mode, uid = "kvm", 0o660, os.geteuid()
    try:
        status = os.stat(path)
        mode = status.st_mode & 0o777
        group = _group_name(status.st_gid)
        evidence = (
            f"{path} has mode {mode:o} and group {group}; this process is user {uid} in groups"
            f" {', '.join(sorted(map(_group_name, {os.getegid(), *os.getgroups()})))}",
        )
    except OSError:
        pass
    if group != "root" and mode & 0o060 == 0o060:
        remedies = [f"join the group: sudo usermod -aG {group} $USER, then log in again"]
    else:
        remedies = [
            f"give it a group: sudo chgrp kvm {path}, sudo chmod 660 {path}; then join it:"
            " sudo usermod -aG kvm $USER, and log in again"
        ]
    return Problem(
        "permission",
        f"this user may not open {path}: {name}",
        evidence,
        (
            *remedies,
            f"or for this user only, until the next boot: sudo setfacl -m u:{uid}:rw {path}",
            f"in a container: also --group-add with the number of the group of {path}",
        ),
    )


def _group_name(gid: int) -> str:
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


# ---- KVM refuses -------------------------------------------------------------------------------


def _refused(error: KvmError, path: str, tree: Tree) -> Problem:
    if error.errno == _errno.EBUSY:
        return _busy(str(error), tree)
    if error.errno == _errno.EIO:
        return Problem(
            "forked",
            f"{error}",
            (),
            (
                "a VM belongs to the process that made it: after fork its file descriptors return"
                " EIO. Make machines in the process that runs them; spawn, don't fork",
            ),
        )
    if error.errno in (_errno.ENOMEM, _errno.EMFILE, _errno.ENFILE):
        return _limit(str(error))
    if error.errno in (_errno.EPERM, _errno.EACCES):
        return Problem(
            "container",
            f"{path} opens, but its ioctls are forbidden: {error}",
            _surroundings(tree),
            ("look for a seccomp filter, SELinux or AppArmor that forbids them",),
        )
    return Problem(
        "refused",
        str(error),
        _surroundings(tree),
        ("look at the kernel's log (sudo dmesg)",),
    )


def _busy(detail: str, tree: Tree) -> Problem:
    others = [name for name in ("vboxdrv", "vmmon") if tree.exists(f"/sys/module/{name}")]
    return Problem(
        "busy",
        f"the processor's virtualization is in other hands: {detail}",
        tuple(f"module {name} is loaded" for name in others),
        (
            "stop the virtual machines of the other hypervisor (VirtualBox, VMware, Xen)"
            + "".join(f", then sudo modprobe -r {name}" for name in others),
        ),
    )


def _limit(what: str) -> Problem:
    return Problem(
        "limit",
        what,
        (),
        ("raise the limit on open files (ulimit -n) or memory (the cgroup's memory.max)",),
    )


def _surroundings(tree: Tree) -> tuple[str, ...]:
    kind = host.container(tree)
    return (f"this process is in a container ({kind})",) if kind else ()


def _for_container(path: str, tree: Tree) -> tuple[str, ...]:
    kind = host.container(tree)
    if not kind:
        return ()
    return ((KUBERNETES if kind == "kubernetes" else DOCKER).format(path=path),)
