"""The doctor without KVM: every way in which it can be missing, on a /proc and /sys of our own."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pykvm import doctor
from pykvm.doctor import access, host, measure
from pykvm.doctor.access import diagnose
from pykvm.doctor.host import AMD64_DE_CFG, VMX_BASIC, Tree
from pykvm.doctor.measure import Ring0, Timing
from tests.support.fake_ioctl import fake_kernel

MISC_WITH_KVM = "232 kvm\n200 tun\n"
MISC_WITHOUT = "200 tun\n 59 kvmish\n"


def cpuinfo(*flags: str, vendor: str = "GenuineIntel") -> str:
    return (
        f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: A Processor\n"
        f"flags\t\t: fpu {' '.join(flags)}\n\n"
        f"processor\t: 1\nvendor_id\t: {vendor}\nflags\t\t: fpu vmx svm\n"
    )


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Tree]:
    """``tree({"/proc/misc": text, …})``: a root with these files in it."""

    def make(files: dict[str, str] | None = None) -> Tree:
        for path, text in (files or {}).items():
            target = tmp_path / "root" / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        return Tree(str(tmp_path / "root"))

    return make


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


# ---- the back end ------------------------------------------------------------------------------


def both_built_in(vendor: str) -> dict[str, str]:
    return {
        "/sys/module/kvm_intel/parameters/nested": "Y",
        "/sys/module/kvm_amd/parameters/nested": "1",
        "/proc/cpuinfo": cpuinfo(vendor=vendor),
    }


def test_the_one_module_is_the_back_end_whatever_the_processor(tree: Callable[..., Tree]) -> None:
    files = {"/sys/module/kvm_pvm/x": "", "/proc/cpuinfo": cpuinfo("vmx")}
    assert host.back_end(tree(files), []) == "kvm-pvm"


def test_what_holds_kvm_counts_more_than_what_shows_parameters(tree: Callable[..., Tree]) -> None:
    files = {**both_built_in("GenuineIntel"), "/sys/module/kvm/holders/kvm_amd/x": ""}
    assert host.modules(tree(files)) == ["kvm_amd"]


def test_of_two_built_in_back_ends_kvm_itself_says_which(tree: Callable[..., Tree]) -> None:
    files = both_built_in("GenuineIntel")
    assert host.back_end(tree(files), [0x8B, AMD64_DE_CFG]) == "kvm-amd"
    assert host.back_end(tree(files), [0x8B, VMX_BASIC]) == "kvm-intel"


@pytest.mark.parametrize(
    ("vendor", "name"),
    [
        ("GenuineIntel", "kvm-intel"),
        ("AuthenticAMD", "kvm-amd"),
        ("HygonGenuine", "kvm-amd"),
        ("SomebodyElse", "unknown"),
    ],
)
def test_of_two_built_in_back_ends_that_say_nothing_the_vendor_decides(
    tree: Callable[..., Tree], vendor: str, name: str
) -> None:
    assert host.back_end(tree(both_built_in(vendor)), []) == name


def test_where_no_module_shows_kvm_may_still_say(tree: Callable[..., Tree]) -> None:
    assert host.back_end(tree(), [VMX_BASIC]) == "kvm-intel"
    assert host.back_end(tree(), []) == "unknown"


def test_backend_is_a_line_with_the_kernel(tree: Callable[..., Tree]) -> None:
    root = tree({"/sys/module/kvm_amd/x": ""}).root
    assert doctor.backend(root) == f"kvm-amd, Linux {os.uname().release}"


# ---- facts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({}, ""),
        ({"/proc/1/cgroup": "0::/init.scope\n"}, ""),
        ({"/.dockerenv": ""}, "docker"),
        ({"/proc/self/cgroup": "1:cpu:/docker/0123\n"}, "docker"),
        ({"/run/.containerenv": ""}, "podman"),
        ({"/proc/1/cgroup": "0::/machine.slice/libpod-1.scope\n"}, "podman"),
        ({"/.dockerenv": "", "/proc/1/cgroup": "0::/kubepods/x\n"}, "kubernetes"),
        ({"/proc/1/cgroup": "0::/lxc.payload.c1\n"}, "lxc"),
        ({"/run/systemd/container": "systemd-nspawn\n"}, "systemd-nspawn"),
    ],
)
def test_containers_are_seen(tree: Callable[..., Tree], files: dict[str, str], kind: str) -> None:
    assert host.container(tree(files)) == kind


@pytest.mark.parametrize(
    ("said", "meant"), [("Y\n", True), ("1\n", True), ("N\n", False), ("0\n", False)]
)
def test_nested_virtualization_is_read_in_both_spellings(
    tree: Callable[..., Tree], said: str, meant: bool
) -> None:
    assert host.nested(tree({"/sys/module/kvm_amd/parameters/nested": said})) is meant


def test_a_module_that_does_not_say_is_not_said_to_nest(tree: Callable[..., Tree]) -> None:
    assert host.nested(tree({"/sys/module/kvm_pvm/parameters/force": "N"})) is None


def test_the_first_processor_counts(tree: Callable[..., Tree]) -> None:
    place = tree({"/proc/cpuinfo": cpuinfo("hypervisor")})
    assert host.virtualization(place) == ""
    assert host.processor(place) == "A Processor"


def test_huge_pages_are_counted(tree: Callable[..., Tree]) -> None:
    pools = "/sys/kernel/mm/hugepages"
    files = {
        "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        f"{pools}/hugepages-2048kB/nr_hugepages": "8\n",
        f"{pools}/hugepages-2048kB/free_hugepages": "5\n",
        f"{pools}/hugepages-1048576kB/nr_hugepages": "0\n",
    }
    assert host.huge_pages(tree(files)) == {
        "transparent": "madvise",
        "pools": {"1G": {"total": 0, "free": 0}, "2M": {"total": 8, "free": 5}},
    }


def test_a_missing_assembler_is_told_with_the_remedy(
    tree: Callable[..., Tree], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert host.assembler(tree()) == ""
    report = doctor.examine("/nowhere/kvm", root=tree().root)
    assert any("binutils" in line for line in report.advice)


# ---- measuring ---------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("as") is None, reason="needs as (binutils)")
def test_the_code_that_is_timed_is_what_its_comment_says() -> None:
    from pykvm.assembler import asm

    assert bytes(asm("l: inc rcx\n jmp l")) == measure.COUNT_CODE
    outs = "out 0x80, al\n" * 63
    assert bytes(asm(f"l: {outs} jmp l")) == measure.OUT_CODE


@pytest.mark.parametrize(
    ("ring0_ns", "verdict", "boots"), [(700.0, "emulated", False), (0.4, "native", True)]
)
def test_ring_0_is_judged_by_ring_3(
    monkeypatch: pytest.MonkeyPatch, ring0_ns: float, verdict: str, boots: bool
) -> None:
    monkeypatch.setattr(measure, "instruction_ns", lambda ring, path: {0: ring0_ns, 3: 0.3}[ring])
    ring0 = measure.ring0()
    assert ring0 == Ring0(verdict, ring0_ns, 0.3, ring0_ns / 0.3)
    report = doctor.Report("/dev/kvm", ring0=ring0)
    assert report.linux[0] is boots
    assert any("ring=3" in line for line in report.advice) is not boots


@pytest.mark.parametrize(("ring3", "told"), [(40.0, True), (15.0, False)])
def test_dear_exits_from_ring_3_are_told(ring3: float, told: bool) -> None:
    costs = {
        "pio_c": Timing("", 12.0, 10.0, 50.0),
        "pio_ring3": Timing("", ring3, ring3, ring3),
    }
    advice = doctor.Report("/dev/kvm", costs=costs).advice
    assert any("4.0 times" in line for line in advice) is told


def test_where_both_rings_are_slow_ring_0_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "instruction_ns", lambda ring, path: {0: 9.0, 3: 5.0}[ring])
    assert measure.ring0().verdict == "native"


def test_a_timing_is_the_median_and_the_first_sample_does_not_count() -> None:
    taken = iter([(9.0, 1), (0.003, 1), (0.001, 1), (0.004, 2), (0.005, 1), (0.009, 1)])
    timing = measure._median("x", lambda seconds: next(taken))
    assert [timing.ns, timing.low, timing.high] == pytest.approx([3e6, 1e6, 9e6])
    assert timing.per_second == pytest.approx(1000 / 3)


def test_a_slow_machine_gets_longer_samples() -> None:
    asked: list[float] = []

    def sample(seconds: float) -> tuple[float, int]:
        asked.append(seconds)
        return seconds, int(seconds / 0.015)

    timing = measure._median("x", sample)
    assert asked[:3] == [0.004, 0.008, 0.016]
    assert set(asked[3:]) == {0.016}
    assert timing.ns == pytest.approx(16e6)


def test_samples_that_all_come_out_empty_are_taken_again_and_longer() -> None:
    taken = iter([1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0])
    timing = measure._median("x", lambda seconds: (seconds, next(taken)))
    assert timing.ns == pytest.approx(8e6)


def test_a_machine_that_makes_no_exit_at_all_ends_the_measurement() -> None:
    with pytest.raises(RuntimeError, match="nothing happened"):
        measure._median("x", lambda seconds: (seconds, 0))


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
