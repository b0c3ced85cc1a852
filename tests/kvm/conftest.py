"""What tests on a real KVM share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import pykvm
from pykvm.kvm import Kvm, Vcpu, Vm
from tests.support.tiny_guest import Ram, ram


@pytest.fixture
def m() -> Iterator[pykvm.Machine]:
    """A machine of one vCPU with nothing in it."""
    with pykvm.Machine(memory="2M") as machine:
        yield machine


@pytest.fixture
def made() -> Iterator[list[pykvm.Machine]]:
    """Machines that a test makes, closed behind it."""
    machines: list[pykvm.Machine] = []
    yield machines
    for m in machines:
        m.close()


@pytest.fixture
def cpu(kvm: Kvm, vcpu: Vcpu) -> Vcpu:
    """The vCPU of ``vm`` with all the CPUID that this KVM supports."""
    vcpu.set_cpuid2(kvm.get_supported_cpuid())
    return vcpu


@pytest.fixture
def memory(vm: Vm) -> Iterator[Ram]:
    """The RAM of ``vm``."""
    with ram(vm, 0x20000) as made:
        yield made
