"""The compiled module: the one place that imports it.

``lib`` holds the C functions of ``csrc/`` and every ``KVM_*`` constant, ``ffi`` the ``struct
kvm_*`` types (cffi, API mode). Both are the same whatever kernel header they were built against;
what the running kernel can do, only KVM_CHECK_EXTENSION tells.

The same file holds a second module, ``_cpython``: what is written against CPython itself
(``csrc/cpython.h``).
"""

from __future__ import annotations

try:
    from ._native import ffi, lib
except ImportError as error:
    raise ImportError(
        f"pykvm's compiled module cannot be loaded: {error}\n"
        "In a checkout it has to be built first, with:  pip install -e .\n"
        "(a C compiler and the C, Python and kernel headers are needed; a wheel brings it along)"
    ) from error

lib.pykvm_cpython_init()

__all__ = ["ffi", "lib"]
