"""Naming instruction families, on bytes that GNU as produced."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.arch.x86_64.instructions import family

LONG = {
    "cc": "INT3 (breakpoint)",
    "cd80": "INT 0x80",
    "cd": "INT",
    "9b": "FWAIT (x87)",
    "d9e8": "x87 floating point",  # fld1
    "dd06": "x87 floating point",  # fld qword [rsi]
    "0f28c1": "SSE or MMX",  # movaps xmm0, xmm1
    "660f6fc1": "SSE or MMX",  # movdqa
    "f30f1006": "SSE or MMX",  # movss
    "66440f6f06": "SSE or MMX",  # with REX
    "0f77": "EMMS (MMX)",
    "660f3800c1": "SSSE3, SSE4 or AES",  # pshufb
    "660f3a0fc108": "SSSE3, SSE4 or AES",  # palignr
    "c5f877": "AVX or BMI (VEX encoding)",  # vzeroupper
    "c4e27918c1": "AVX or BMI (VEX encoding)",  # vbroadcastss
    "62f17c4828c1": "AVX-512",
    "480fc70e": "CMPXCHG16B",
    "0fc70e": "CMPXCHG8B",
    "0fae06": "FXSAVE",
    "0fae0e": "FXRSTOR",
    "0fae26": "XSAVE",
    "0fae2e": "XRSTOR",
    "480fae2e": "XRSTOR",
    "0fae16": "LDMXCSR (SSE)",
    "0faee8": "a memory fence",  # lfence
    "f3480faed0": "WRFSBASE",
    "0fc7f0": "RDRAND",
    "0fc7f8": "RDSEED",
    "f30fc7f8": "RDPID",
    "0fc71e": "XRSTORS",
    "0f01d0": "XGETBV",
    "0f01c1": "VMCALL (hypercall)",
    "0f01f8": "SWAPGS",
    "0f0b": "UD2 (undefined on purpose)",
    "0f05": "SYSCALL",
    "90": "",
    "48c7c001000000": "",  # mov rax, 1
    "f4": "",
    "0f20c0": "",  # mov rax, cr0
    "0fb6c0": "",  # movzx
    "0f01": "",
    "0f": "",
    "66": "",
    "": "",
}


@pytest.mark.parametrize("code, name", LONG.items())
def test_families_of_64_bit_code(code: str, name: str) -> None:
    assert family(bytes.fromhex(code)) == name


@pytest.mark.parametrize(
    "code, name",
    [
        ("40", ""),  # inc eax, where 64-bit code has a REX prefix
        ("400f28c1", ""),
        ("c506", ""),  # lds
        ("c406", ""),  # les
        ("6206", ""),  # bound
        ("c5f877", "AVX or BMI (VEX encoding)"),
        ("d9e8", "x87 floating point"),
        ("ce", "INTO"),
    ],
)
def test_families_of_32_bit_code(code: str, name: str) -> None:
    assert family(bytes.fromhex(code), long=False) == name


@given(st.binary(max_size=16), st.booleans())
def test_any_bytes_have_some_family_or_none(code: bytes, long: bool) -> None:
    assert isinstance(family(code, long), str)
