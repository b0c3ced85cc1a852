"""The table of names newer than the header, and the promise that goes with it.

The promise: the compiled module offers the same names with the same values, whatever header it
was built against. So it is built once more, against a header that has none of the table's names.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from build_ffi import HERE, write
from gen_kvm_cdef import HEADERS, Compiler, Header, constants, generate
from newer_names import CONSTANTS, STRUCTS

from pykvm._abi import ffi, lib

LIMIT = 200
"""Seconds for one command; a compiler on a slow machine needs many."""
pytestmark = pytest.mark.watchdog(2 * LIMIT)

#: Structures that Linux 5.14 has, without the members that came later.
GREW = {
    "kvm_stats_desc": ("bucket_size",),
    "kvm_clock_data": ("realtime", "host_tsc"),
    "kvm_xsave": ("extra",),
    "kvm_vcpu_events": ("triple_fault",),
}

INCLUDES = "".join(f"#include <{name}>\n" for name in HEADERS)

DESCRIBE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
lib, ffi = module.lib, module.ffi

def fields(ctype, base=0):
    found = {}
    for name, field in ctype.fields or ():
        if not name:
            found.update(fields(field.type, base + field.offset))
        else:
            found[name] = [base + field.offset, field.bitshift, field.bitsize, field.type.kind]
    return found

tags = [f"struct {tag}" for tag in ffi.list_types()[1] if not tag.startswith("gone_")]
print(json.dumps({
    "names": {name: repr(getattr(lib, name)) for name in dir(lib) if name.isupper()},
    "functions": [name for name in dir(lib) if not name.isupper()],
    "structs": {tag: [ffi.sizeof(tag), fields(ffi.typeof(tag))] for tag in tags},
    "three msrs": ffi.sizeof(ffi.new("struct kvm_msrs *", {"entries": 3})[0]),
}))
"""


def older_headers(folder: Path) -> Compiler:
    """Copy the installed headers, take out every name of the table, return a compiler for them."""
    text = Compiler().preprocess(INCLUDES)
    paths = {Path(path) for path in re.findall(r'^# \d+ "(/[^"]*/kvm(?:_para)?\.h)"', text, re.M)}
    assert {f"{path.parent.name}/{path.name}" for path in paths} == {
        "linux/kvm.h",
        "linux/kvm_para.h",
        "asm/kvm.h",
        "asm/kvm_para.h",
    }
    words = [constant.name for constant in CONSTANTS]
    words += [struct.tag for struct in STRUCTS if struct.tag not in GREW]
    words += [name for names in GREW.values() for name in names]
    newer = re.compile(r"\b(" + "|".join(words) + r")\b")
    for path in paths:
        copy = folder / path.parent.name / path.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(newer.sub(r"gone_\1", path.read_text()))
    return Compiler(flags=[f"-I{folder}"])


def build(folder: Path, compiler: Compiler) -> Path:
    """Build the compiled module as setup.py does, without setuptools."""
    folder.mkdir()
    write(str(folder), compiler)
    module = folder / "_native.so"
    python = [f"-I{sysconfig.get_path(name)}" for name in ("include", "platinclude")]
    command = [*compiler.command, *compiler.flags, "-std=gnu11", "-shared", "-fPIC", "-w"]
    command += [f"-I{folder}", f"-I{HERE}", *python, "-o", str(module), f"{folder}/_native.c"]
    command += [str(path) for path in sorted(Path(HERE).glob("*.c"))]
    subprocess.run(command, check=True, timeout=LIMIT)
    return module


def describe(module: Path) -> dict[str, Any]:
    """Load a compiled module in a process of its own, and list what it offers."""
    command = [sys.executable, "-c", DESCRIBE, str(module)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    return older_headers(tmp_path_factory.mktemp("headers"))


def test_the_older_header_really_lacks_the_names(older: Compiler) -> None:
    header = Header.read(older, INCLUDES)
    known = set(constants(older, INCLUDES, header))
    assert known.isdisjoint(constant.name for constant in CONSTANTS)
    assert "KVM_GET_REGS" in known
    for struct in STRUCTS:
        assert (struct.tag in header.structs) == (struct.tag in GREW)
    for tag, names in GREW.items():
        assert header.fields(tag).isdisjoint(names)


def test_the_module_is_the_same_whatever_header_it_was_built_against(
    older: Compiler, tmp_path: Path
) -> None:
    folders = [tmp_path / "installed", tmp_path / "older"]
    with ThreadPoolExecutor() as pool:
        ours, theirs = map(describe, pool.map(build, folders, [Compiler(), older]))
    for description in (ours, theirs):
        # kvm_sync_regs has events of the header's own type; what it grew lies in `reserved`.
        description["structs"].pop("struct kvm_sync_regs")
        description["structs"].pop("struct kvm_vcpu_events_of_older_header", None)
    assert theirs["names"] == ours["names"]
    assert theirs["functions"] == ours["functions"]
    assert theirs["three msrs"] == ours["three msrs"] == 8 + 3 * 16
    assert theirs["structs"] == ours["structs"]


def test_the_names_are_those_of_the_module_in_use(older: Compiler) -> None:
    generated = generate(older)
    assert {name for name in dir(lib) if re.match("(MSR_)?KVM|GUEST_MEMFD_", name)} == set(
        generated.constants
    )
    assert {constant.name for constant in CONSTANTS} <= set(generated.constants)


def test_header_and_table_agree_in_every_value(tmp_path: Path) -> None:
    """A name that the installed header knows has the table's value there; and in the module."""
    compiler = Compiler()
    in_header = set(constants(compiler, INCLUDES, Header.read(compiler, INCLUDES)))
    common = [constant for constant in CONSTANTS if constant.name in in_header]
    source = INCLUDES + "".join(
        f'_Static_assert(({constant.name}) == ({constant.value}), "{constant.name}");\n'
        for constant in common
    )
    wrong = [source.splitlines()[line - 1] for line in compiler.refused_lines(source)]
    assert wrong == []


def test_header_and_table_agree_in_every_structure() -> None:
    """Where the installed header has a structure in full, the table's copy is laid out alike."""
    compiler = Compiler()
    header = Header.read(compiler, INCLUDES)
    for struct in STRUCTS:
        own = Header.read(compiler, f"#include <linux/types.h>\n{struct.text}").fields(struct.tag)
        if not own <= header.fields(struct.tag):
            continue
        copy = re.sub(rf"\bstruct {struct.tag}\b", "struct copy", struct.text)
        asserts = [f"sizeof(struct copy) == sizeof(struct {struct.tag})"] + [
            f"__builtin_offsetof(struct copy, {name}) =="
            f" __builtin_offsetof(struct {struct.tag}, {name})"
            for name in own
        ]
        text = "".join(f'_Static_assert({line}, "");\n' for line in asserts)
        assert compiler.accepts(f"{INCLUDES}{copy}\n{text}"), struct.tag


@pytest.mark.parametrize("member", ["system_event", "notify", "hypercall", "memory_fault"])
def test_overlay_of_a_kvm_run_member_fits_the_member(member: str) -> None:
    overlay = ffi.typeof(f"struct pykvm_run_{member}")
    union = ffi.offsetof("struct kvm_run", "hw")
    assert ffi.sizeof(overlay) <= ffi.offsetof("struct kvm_run", "kvm_valid_regs") - union
    known = dict(ffi.typeof("struct kvm_run").fields)
    if member not in known:
        pytest.skip(f"the installed linux/kvm.h has no kvm_run.{member}")
    assert known[member].offset == union
    assert ffi.sizeof(overlay) == ffi.sizeof(known[member].type)


def test_ioctl_numbers_of_the_table() -> None:
    """The numbers as strace prints them: direction, size, type 0xAE, number."""
    assert lib.KVM_SET_USER_MEMORY_REGION2 == 0x40A0AE49
    assert lib.KVM_SET_MEMORY_ATTRIBUTES == 0x4020AED2
    assert lib.KVM_CREATE_GUEST_MEMFD == 0xC040AED4
    assert lib.KVM_PRE_FAULT_MEMORY == 0xC040AED5
    assert lib.KVM_GET_XSAVE2 == 0x9000AECF


def test_every_name_stands_once_with_its_release() -> None:
    names = [constant.name for constant in CONSTANTS]
    assert len(names) > 100
    assert sorted(names) == sorted(set(names))
    releases = [constant.since for constant in CONSTANTS] + [struct.since for struct in STRUCTS]
    assert all(re.fullmatch(r"[5-9]\.\d+", since) for since in releases)
    order = [tuple(map(int, constant.since.split("."))) for constant in CONSTANTS]
    assert order == sorted(order)
