"""The doctor without KVM: every way in which it can be missing, on a /proc and /sys of our own."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pykvm import doctor
from pykvm.doctor import access, host, measure
from pykvm.doctor.access import diagnose
from pykvm.doctor.host import Tree
from pykvm.doctor.measure import Ring0, Timing
from pykvm.host import open_kvm
from tests.support.fake_ioctl import fake_kernel
from tests.support.proc_tree import MISC_WITH_KVM, MISC_WITHOUT, cpuinfo


@pytest.fixture
def refusing_open(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``refusing_open(EACCES)``: opening /dev/… fails so. A fake, as root may open everything."""
    real = os.open

    def refuse(number: int) -> None:
        def fake(path: Any, *args: Any, **more: Any) -> int:
            if str(path).startswith("/dev/"):
                raise OSError(number, os.strerror(number), path)
            return real(path, *args, **more)

        monkeypatch.setattr(os, "open", fake)

    return refuse


# ---- no device ---------------------------------------------------------------------------------


def test_a_kernel_with_kvm_but_no_node_asks_for_the_device_in_a_container(
    tree: Callable[..., Tree],
) -> None:
    problem = diagnose("/nowhere/kvm", tree({"/proc/misc": MISC_WITH_KVM, "/.dockerenv": ""}))
    assert problem is not None
    assert problem.code == "no-device"
    assert "/nowhere/kvm" in problem.what
    assert "--device /nowhere/kvm" in problem.remedies[0]
    assert any("docker" in seen for seen in problem.evidence)


def test_without_a_container_the_node_is_to_be_made(tree: Callable[..., Tree]) -> None:
    problem = diagnose("/nowhere/kvm", tree({"/proc/misc": MISC_WITH_KVM}))
    assert problem is not None
    assert problem.code == "no-device"
    assert problem.remedies == (
        "make the node: sudo mknod /nowhere/kvm c 10 232, sudo chmod 660 /nowhere/kvm",
    )


@pytest.mark.parametrize(("flag", "module"), [("vmx", "kvm_intel"), ("svm", "kvm_amd")])
def test_a_processor_with_virtualization_wants_its_module(
    tree: Callable[..., Tree], flag: str, module: str
) -> None:
    files = {"/proc/misc": MISC_WITHOUT, "/proc/cpuinfo": cpuinfo(flag, "hypervisor")}
    problem = diagnose("/nowhere/kvm", tree(files))
    assert problem is not None
    assert problem.code == "no-module"
    assert f"modprobe {module}" in problem.remedies[0]


def test_a_virtual_machine_without_virtualization_wants_it_nested(
    tree: Callable[..., Tree],
) -> None:
    files = {"/proc/misc": MISC_WITHOUT, "/proc/cpuinfo": cpuinfo("hypervisor")}
    problem = diagnose("/nowhere/kvm", tree(files))
    assert problem is not None
    assert problem.code == "no-virtualization"
    assert "nested=1" in problem.remedies[0]


def test_a_bare_machine_without_virtualization_wants_its_firmware_changed(
    tree: Callable[..., Tree],
) -> None:
    files = {"/proc/misc": MISC_WITHOUT, "/proc/cpuinfo": cpuinfo()}
    problem = diagnose("/nowhere/kvm", tree(files))
    assert problem is not None
    assert problem.code == "no-virtualization"
    assert "firmware" in problem.remedies[0]
    assert not any("nested" in remedy for remedy in problem.remedies)


def test_kubernetes_is_not_told_about_docker_options(tree: Callable[..., Tree]) -> None:
    files = {"/proc/misc": MISC_WITH_KVM, "/proc/1/cgroup": "0::/kubepods/pod1/x\n"}
    problem = diagnose("/nowhere/kvm", tree(files))
    assert problem is not None
    assert "device plugin" in problem.remedies[0]


@pytest.mark.parametrize("number", [errno.ENODEV, errno.ENXIO])
def test_a_node_without_a_driver_is_told_from_a_missing_node(
    tree: Callable[..., Tree], refusing_open: Callable[[int], None], number: int
) -> None:
    refusing_open(number)
    files = {"/proc/misc": MISC_WITHOUT, "/proc/cpuinfo": cpuinfo("svm")}
    problem = diagnose("/dev/kvm", tree(files))
    assert problem is not None
    assert problem.code == "no-module"
    assert "behind /dev/kvm" in problem.what and errno.errorcode[number] in problem.what


# ---- a device that may not be opened -----------------------------------------------------------


def device_mode(monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    """Let /dev/… have this mode and group 4711."""
    real = os.stat
    status = os.stat_result((0o20000 | mode, 0, 0, 1, 0, 4711, 0, 0, 0, 0))

    def fake(path: Any, **more: Any) -> os.stat_result:
        return status if str(path).startswith("/dev/") else real(path, **more)

    monkeypatch.setattr(os, "stat", fake)


def test_a_forbidden_device_names_its_group(
    tree: Callable[..., Tree],
    refusing_open: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refusing_open(errno.EACCES)
    device_mode(monkeypatch, 0o660)
    monkeypatch.setattr(access, "_group_name", lambda gid: {4711: "virt"}.get(gid, str(gid)))
    problem = diagnose("/dev/kvm", tree())
    assert problem is not None
    assert problem.code == "permission"
    assert "mode 660 and group virt" in problem.evidence[0]
    assert "usermod -aG virt" in problem.remedies[0] and "log in again" in problem.remedies[0]


@pytest.mark.parametrize(("mode", "group"), [(0o600, "kvm"), (0o660, "root")])
def test_a_device_that_no_group_may_open_is_given_one_first(
    tree: Callable[..., Tree],
    refusing_open: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    mode: int,
    group: str,
) -> None:
    refusing_open(errno.EACCES)
    device_mode(monkeypatch, mode)
    monkeypatch.setattr(access, "_group_name", lambda gid: group)
    problem = diagnose("/dev/kvm", tree())
    assert problem is not None
    assert "chgrp kvm /dev/kvm" in problem.remedies[0]
    assert "usermod -aG kvm" in problem.remedies[0]


def test_a_container_that_forbids_the_device_is_told_from_a_file_mode(
    tree: Callable[..., Tree], refusing_open: Callable[[int], None]
) -> None:
    refusing_open(errno.EPERM)
    problem = diagnose("/dev/kvm", tree({"/run/.containerenv": ""}))
    assert problem is not None
    assert problem.code == "container"
    assert "--device /dev/kvm" in problem.remedies[0]


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EBUSY, "busy"), (errno.EMFILE, "limit"), (errno.ELOOP, "refused")]
)
def test_other_refusals_to_open_have_codes_of_their_own(
    tree: Callable[..., Tree], refusing_open: Callable[[int], None], number: int, code: str
) -> None:
    refusing_open(number)
    problem = diagnose("/dev/kvm", tree())
    assert problem is not None
    assert problem.code == code
    assert errno.errorcode[number] in problem.what


# ---- a device that is no KVM, or a KVM that refuses --------------------------------------------


def test_a_regular_file_is_no_kvm(tmp_path: Path, tree: Callable[..., Tree]) -> None:
    file = tmp_path / "kvm"
    file.write_bytes(b"")
    problem = diagnose(str(file), tree())
    assert problem is not None
    assert problem.code == "not-kvm"
    assert "not a KVM device" in problem.what


def test_a_folder_is_no_kvm(tmp_path: Path, tree: Callable[..., Tree]) -> None:
    problem = diagnose(str(tmp_path), tree())
    assert problem is not None
    assert problem.code == "not-kvm"


def test_another_version_of_the_api_is_no_kvm_for_us(tree: Callable[..., Tree]) -> None:
    with fake_kernel():  # a good one, of the same name, which has been asked
        open_kvm("/dev/null")[0].close()
    with fake_kernel() as kernel:
        kernel.answers["KVM_GET_API_VERSION"] = 10
        problem = diagnose("/dev/null", tree())
    assert problem is not None
    assert problem.code == "not-kvm"
    assert "version 10" in problem.what


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (errno.EBUSY, "busy", "VirtualBox"),
        (errno.EIO, "forked", "spawn"),
        (errno.ENOMEM, "limit", "memory"),
        (errno.EPERM, "container", "seccomp"),
        (errno.EINVAL, "refused", "dmesg"),
    ],
)
def test_a_kvm_that_makes_no_vm_says_why(
    tree: Callable[..., Tree], number: int, code: str, word: str
) -> None:
    with fake_kernel() as kernel:
        kernel.answers["KVM_CREATE_VM"] = -number
        problem = diagnose("/dev/null", tree())
    assert problem is not None
    assert problem.code == code
    assert "KVM_CREATE_VM" in problem.what
    assert word in " ".join(problem.remedies)


def test_the_other_hypervisor_is_named_by_its_module(tree: Callable[..., Tree]) -> None:
    with fake_kernel() as kernel:
        kernel.answers["KVM_CREATE_VM"] = -errno.EBUSY
        problem = diagnose("/dev/null", tree({"/sys/module/vboxdrv/refcnt": "1"}))
    assert problem is not None
    assert problem.evidence == ("module vboxdrv is loaded",)
    assert "modprobe -r vboxdrv" in problem.remedies[0]


# ---- the report --------------------------------------------------------------------------------


KEYS = {
    "schema", "device", "usable", "problem", "host", "backend", "capabilities", "limits", "ring0",
    "linux", "costs", "advice", "failed", "seconds",
}  # fmt: skip


def full_report() -> doctor.Report:
    return doctor.Report(
        "/dev/kvm",
        host=dict.fromkeys(host.FACTS),
        backend=doctor.Backend("kvm-amd", ("kvm_amd",), True, "so"),
        capabilities=[
            doctor.Capability("KVM_CAP_A", 3, "good"),
            doctor.Capability("KVM_CAP_B", 0, "better"),
        ],
        limits={"recommended_vcpus": 2, "vcpus": 8, "vcpu_id": 9, "memory_slots": 32},
        ring0=Ring0("native", 0.3, 0.2, 1.5),
        costs={name: Timing(name, 1.0, 0.5, 2.0) for name in measure.COSTS},
    )


def test_the_plain_data_is_complete_and_documented() -> None:
    data = full_report().to_dict()
    json.dumps(data)
    assert set(data) == KEYS
    assert data["capabilities"] == {
        "present": {"KVM_CAP_A": {"value": 3, "means": "good"}},
        "missing": {"KVM_CAP_B": {"means": "better"}},
    }
    assert data["costs"]["pio_c"] == {
        "what": "pio_c", "ns": 1.0, "low": 0.5, "high": 2.0, "per_second": 1e9,
    }  # fmt: skip
    schema = (doctor.__doc__ or "").partition("::")[2]
    nested = [*data["host"], *data["costs"], *data["backend"], *data["limits"], *data["ring0"]]
    for key in [*KEYS, *nested]:
        assert key in schema, f"{key} is not in the schema"


def test_a_report_without_kvm_is_complete_too(tree: Callable[..., Tree]) -> None:
    report = doctor.examine("/nowhere/kvm", root=tree().root)
    assert not report.usable
    data = report.to_dict()
    json.dumps(data)
    assert set(data) == KEYS
    assert data["usable"] is False
    assert data["problem"]["code"] == "no-virtualization"
    assert data["backend"] is data["capabilities"] is data["limits"] is data["ring0"] is None
    assert data["costs"] == data["failed"] == {}
    assert data["linux"]["boots"] is False


def test_one_look_that_fails_is_a_line_and_not_the_end(
    tree: Callable[..., Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(tree: Tree) -> None:
        raise ValueError("no such luck")

    monkeypatch.setitem(host.FACTS, "processor", broken)
    report = doctor.examine("/nowhere/kvm", root=tree().root)
    assert report.failed == {"host.processor": "ValueError: no such luck"}
    assert report.host["processor"] is None
    assert report.host["kernel"] == os.uname().release


def test_an_examination_that_fails_leaves_kvm_unusable_and_the_report_whole(
    tree: Callable[..., Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: str, tree: Tree) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(doctor, "diagnose", broken)
    report = doctor.examine("/dev/kvm", root=tree().root)
    assert report.problem is not None
    assert "oops" in report.problem.what
    assert report.costs == {}
