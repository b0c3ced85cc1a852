"""The public face: what is exported is there, documented, and cheap to import."""

from __future__ import annotations

import inspect

import pykvm
import pykvm.kvm
from pykvm import errors


def test_every_exported_name_exists_and_nothing_public_is_missing() -> None:
    assert sorted(pykvm.__all__) == pykvm.__all__
    for name in pykvm.__all__:
        assert getattr(pykvm, name) is not None, name
    public = {
        name
        for name, value in vars(pykvm).items()
        if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
    }
    assert public <= set(pykvm.__all__)
    assert set(pykvm.__all__) <= set(dir(pykvm))


def test_every_error_is_exported_and_a_pykvm_error() -> None:
    mine = {n for n, v in vars(errors).items() if inspect.isclass(v) and issubclass(v, Exception)}
    assert mine <= set(pykvm.__all__)
    for name in mine:
        assert issubclass(getattr(pykvm, name), pykvm.PykvmError)


def test_every_exported_name_is_documented() -> None:
    for module in (pykvm, pykvm.kvm):
        for name in module.__all__:
            value = getattr(module, name)
            if not isinstance(value, str):
                assert inspect.getdoc(value), f"{module.__name__}.{name}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    try:
        pykvm.nonsense  # noqa: B018
    except AttributeError as error:
        assert "nonsense" in str(error)
    else:
        raise AssertionError("no AttributeError")


def test_a_kvm_error_survives_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(errors.KvmError("KVM_RUN", 22, "because")))
    assert (error.ioctl, error.errno, error.hint) == ("KVM_RUN", 22, "because")
    assert "EINVAL" in str(error) and "because" in str(error)
