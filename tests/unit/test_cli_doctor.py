"""``pykvm doctor`` without KVM: what it prints of a report, and when it fails."""

from __future__ import annotations

import json
from typing import Any

import pytest

import pykvm
from pykvm import doctor
from pykvm.doctor import host, measure
from tests.support.command_line import invoke


def test_doctor_without_kvm_says_why_and_what_to_do_and_fails() -> None:
    result = invoke("doctor", "--device", "/nowhere/kvm")
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert lines[0].startswith("KVM cannot be used here: there is no /nowhere/kvm")
    assert "What to do" in lines
    assert result.output == "".join(f"{line.rstrip()}\n" for line in lines)


def test_doctor_as_json_is_the_report() -> None:
    result = invoke("doctor", "--device", "/nowhere/kvm", "--json")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert data["usable"] is False
    assert data["pykvm"] == pykvm.__version__
    assert set(data) == {"pykvm", *doctor.examine("/nowhere/kvm").to_dict()}


def report(**said: Any) -> doctor.Report:
    return doctor.Report("/dev/kvm", **{"host": dict.fromkeys(host.FACTS), **said})


def test_doctor_tells_a_newcomer_what_matters_last(monkeypatch: pytest.MonkeyPatch) -> None:
    full = report(
        backend=doctor.Backend("kvm-amd", ("kvm_amd",), False, "it says so"),
        capabilities=[
            doctor.Capability("KVM_CAP_ONE", 3, "the one thing"),
            doctor.Capability("KVM_CAP_OTHER", 0, "the other thing"),
        ],
        limits={"recommended_vcpus": 2, "vcpus": 8, "vcpu_id": 9, "memory_slots": 32},
        ring0=doctor.Ring0("emulated", 712.3, 0.25, 2849.2),
        costs={name: doctor.Timing(name, 1234.0, 0.5, 2e6) for name in measure.COSTS},
        failed={"limits": "ValueError: no such luck"},
    )
    monkeypatch.setattr(doctor, "examine", lambda device: full)
    result = invoke("doctor")
    assert result.exit_code == 0
    shown = result.output
    for words in (
        "What this KVM can do (1)", "the one thing", "ONE = 3",
        "What it cannot (1)", "the other thing", "OTHER",
        "KVM can be used here.", "kvm-amd (kernel module: kvm_amd)",
        "emulated: 712 ns an instruction, 0.25 ns in ring 3", "does not boot",
        "guests cannot run KVM", "at most 8 processors", "1.23 µs", "2 ms", "810,373",
        "ring=3, iopl=3", "Not found out", "limits: ValueError: no such luck",
    ):  # fmt: skip
        assert words in shown, words
    assert shown.index("the other thing") < shown.index("KVM can be used here.")


def test_doctor_prints_a_report_of_which_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda device: report())
    result = invoke("doctor")
    assert result.exit_code == 0, result.exception
    assert "not known" in result.output
    assert "None" not in result.output
