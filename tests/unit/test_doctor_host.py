"""What the doctor tells of a host, on a /proc and /sys of our own: its back end, its facts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pykvm import doctor
from pykvm.doctor import host
from pykvm.doctor.host import AMD64_DE_CFG, VMX_BASIC, Tree
from tests.support.proc_tree import cpuinfo

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
