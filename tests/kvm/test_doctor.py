"""The doctor on the KVM that is here."""

from __future__ import annotations

import json
import os

import pytest

from pykvm import doctor
from pykvm.doctor import measure
from pykvm.machine import Machine


@pytest.fixture(scope="module")
def report() -> doctor.Report:
    return doctor.examine()


def test_kvm_is_usable_and_nothing_stayed_unknown(report: doctor.Report) -> None:
    assert report.usable, report.problem
    assert report.failed == {}
    data = report.to_dict()
    json.dumps(data)
    assert data["problem"] is None
    assert data["backend"]["name"] != ""


def test_an_examination_is_short(report: doctor.Report) -> None:
    # The measurements are bounded by time; what they are on an emulated processor is Python.
    assert report.seconds < 20


def test_capabilities_come_with_what_kvm_says_and_in_words(report: doctor.Report) -> None:
    from pykvm.kvm import Kvm

    by_name = {cap.name: cap for cap in report.capabilities}
    with Kvm() as kvm, kvm.create_vm() as vm:
        for name in ("KVM_CAP_USER_MEMORY", "KVM_CAP_MAX_VCPUS", "KVM_CAP_X86_SMM"):
            assert by_name[name].value == vm.check_extension(name)
    assert all(cap.means for cap in report.capabilities)
    assert report.limits is not None
    assert 1 <= report.limits["recommended_vcpus"] <= report.limits["vcpus"]


def test_every_cost_is_measured_and_its_median_lies_between(report: doctor.Report) -> None:
    assert set(report.costs) == set(measure.COSTS)
    for timing in report.costs.values():
        assert 0 < timing.low <= timing.ns <= timing.high, timing


def test_an_exit_costs_less_than_a_machine(report: doctor.Report) -> None:
    assert report.costs["pio_c"].low < report.costs["machine"].low


def test_ring_3_runs_at_the_speed_of_the_processor_or_ring_0_is_no_slower(
    report: doctor.Report,
) -> None:
    ring0 = report.ring0
    assert ring0 is not None
    assert ring0.ratio == pytest.approx(ring0.ring0_ns / ring0.ring3_ns)
    if ring0.verdict == "emulated":
        assert ring0.ring0_ns > 50  # an emulator takes hundreds of host instructions for one
    assert report.linux[0] is (ring0.verdict == "native")


def test_an_examination_leaves_nothing_behind(no_leak: None) -> None:
    assert doctor.examine(measured=False).usable


def test_a_measurement_that_fails_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: str) -> measure.Timing:
        raise RuntimeError("no exit came")

    only = {"pio_c": broken, "ioctl": measure.COSTS["ioctl"]}
    monkeypatch.setattr(measure, "COSTS", only)
    report = doctor.examine()
    assert report.usable
    assert report.failed == {"costs.pio_c": "RuntimeError: no exit came"}
    assert set(report.costs) == {"ioctl"}


def test_a_guest_that_ends_on_its_own_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="ended: unclaimed"):
        measure._exits("x", "/dev/kvm", 0, lambda m: None)


def test_kvm_that_runs_no_guest_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    # Instead of HLT the guest loops: all ioctls work, and yet nothing comes of it.
    from pykvm.doctor import access

    real = Machine.run
    monkeypatch.setattr(access, "_HLT", b"\xeb\xfe")
    monkeypatch.setattr(Machine, "run", lambda self, timeout: real(self, timeout=0.01))
    problem = doctor.diagnose()
    assert problem is not None
    assert problem.code == "run"
    assert "timeout" in problem.what
    assert any("rip 0x8000" in line for line in problem.evidence)


def test_a_device_by_another_name_is_the_same_kvm(tmp_path: os.PathLike[str]) -> None:
    link = os.path.join(tmp_path, "kvm")
    os.symlink("/dev/kvm", link)
    assert doctor.diagnose(link) is None
