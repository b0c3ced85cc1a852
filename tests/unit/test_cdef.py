"""The generated cdef against the compiler: every type, every field, every constant."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gen_kvm_cdef import BuildError, Compiler, Generated, check_toolchain, generate

from pykvm._abi import ffi, lib

SHOW = """
static void show(const char *name, size_t a, size_t b) { printf("%s:%zu:%zu\\n", name, a, b); }
"""


def run_c(source: str, folder: Path, *flags: str) -> str:
    """Compile a C program, run it, return what it printed."""
    program = folder / "program"
    result = Compiler(flags=flags).run(source, "-w", "-o", str(program))
    assert result.returncode == 0, result.stderr
    return subprocess.run([program], capture_output=True, text=True, check=True, timeout=100).stdout


def fields_of(ctype: Any, base: int = 0) -> Iterator[tuple[str, int, Any]]:
    """Yield name, offset and cffi's field of all members, those of unnamed members included."""
    for name, field in ctype.fields or ():
        if name:
            yield name, base + field.offset, field
        else:
            yield from fields_of(field.type, base + field.offset)


def is_flexible(ctype: Any) -> bool:
    return ctype.kind == "array" and ctype.length is None


@pytest.fixture(scope="module")
def generated() -> Generated:
    return generate(Compiler())


def test_size_and_alignment_of_every_type_are_the_compilers(
    generated: Generated, tmp_path: Path
) -> None:
    lines = "".join(f'show("{t}", sizeof({t}), _Alignof({t}));\n' for t in generated.structs)
    output = run_c(
        f"{generated.preamble}#include <stdio.h>\n{SHOW}int main(void) {{ {lines} return 0; }}",
        tmp_path,
    )
    compilers = dict(line.split(":", 1) for line in output.splitlines())
    ours = {t: f"{ffi.sizeof(t)}:{ffi.alignof(t)}" for t in generated.structs}
    assert len(ours) > 100
    assert ours == compilers


def test_offset_and_size_of_every_field_are_the_compilers(
    generated: Generated, tmp_path: Path
) -> None:
    ours = {}
    lines = ""
    for ctype in generated.structs:
        for name, offset, field in fields_of(ffi.typeof(ctype)):
            if field.bitsize >= 0:
                continue
            key = f"{ctype}.{name}"
            if is_flexible(field.type):
                size, text = 0, "0"
            else:
                size, text = ffi.sizeof(field.type), f"sizeof((({ctype} *)0)->{name})"
            ours[key] = f"{offset}:{size}"
            lines += f'show("{key}", offsetof({ctype}, {name}), {text});\n'
    output = run_c(
        f"{generated.preamble}#include <stdio.h>\n#include <stddef.h>\n{SHOW}"
        f"int main(void) {{ {lines} return 0; }}",
        tmp_path,
    )
    assert len(ours) > 500
    assert ours == dict(line.split(":", 1) for line in output.splitlines())


def test_every_constant_has_the_compilers_value(generated: Generated, tmp_path: Path) -> None:
    lines = "".join(
        f'printf("%s %d %llu\\n", "{name}", ({name}) < 0, (unsigned long long)({name}));\n'
        for name in generated.constants
    )
    output = run_c(
        f"{generated.preamble}#include <stdio.h>\nint main(void) {{ {lines} return 0; }}", tmp_path
    )
    compilers = {}
    for line in output.splitlines():
        name, negative, value = line.split()
        compilers[name] = int(value) - (1 << 64 if negative == "1" else 0)
    assert {name: getattr(lib, name) for name in generated.constants} == compilers


def test_no_structure_of_the_headers_is_forgotten(generated: Generated) -> None:
    text = Compiler().preprocess(generated.preamble)
    tags = set(re.findall(r"\bstruct (kvm_\w+)\s*\{", text))
    assert len(tags) > 80
    missing = {f"struct {tag}" for tag in tags if "_of_older_header" not in tag}
    assert missing - set(generated.structs) == set()


def test_no_integer_macro_of_the_headers_is_forgotten(generated: Generated) -> None:
    """What is left out, is left out because a C program could not use it as a number either."""
    compiler = Compiler()
    text = compiler.preprocess(generated.preamble, "-dM")
    names = set(re.findall(r"^#define (KVM_\w+) ", text, re.M)) - set(generated.constants)
    usable = [
        name
        for name in names
        if compiler.accepts(f"{generated.preamble}\nint array[({name}) ? 1 : 2];\n")
    ]
    # A string is a fine condition for gcc, but not a number.
    assert usable in ([], ["KVM_SIGNATURE"])


def test_everything_generated_is_in_the_module(generated: Generated) -> None:
    assert set(generated.constants) <= set(dir(lib))
    typedefs, structs, unions = ffi.list_types()
    known = {*typedefs, *(f"struct {tag}" for tag in structs), *(f"union {tag}" for tag in unions)}
    assert set(generated.structs) <= known


def test_constants_beyond_plain_macros() -> None:
    assert lib.KVM_DEV_TYPE_VFIO == 4  # an enumerator, and a macro of its own name
    assert lib.KVM_SEV_LAUNCH_START == 2  # an enumerator only
    assert lib.KVM_GET_REGS == 0x8090AE81  # an expression with a sizeof
    assert lib.MSR_KVM_SYSTEM_TIME_NEW == 0x4B564D01
    assert lib.KVM_REG_ARCH_MASK == 0xFF << 56  # does not fit a signed 64-bit integer


def test_array_with_an_expression_for_its_size() -> None:
    assert len(ffi.new("struct kvm_sregs *").interrupt_bitmap) == 4


def test_flexible_array_takes_its_length_at_allocation() -> None:
    msrs = ffi.new("struct kvm_msrs *", {"nmsrs": 3, "entries": 3})
    msrs.entries[2].index = 0x10
    assert ffi.sizeof(msrs[0]) == ffi.sizeof("struct kvm_msrs") + 3 * 16
    with pytest.raises(IndexError):
        msrs.entries[3].index = 0


def test_unnamed_union_inside_a_named_member_of_kvm_run() -> None:
    run = ffi.new("struct kvm_run *")
    run.system_event.data[15] = 7
    assert ffi.sizeof(run.system_event) == 4 + 4 + 16 * 8
    assert run.system_event.flags == 0
    assert ffi.offsetof("struct kvm_run", "system_event") == ffi.offsetof("struct kvm_run", "hw")


def test_empty_union_at_the_end_of_kvm_nested_state() -> None:
    assert ffi.sizeof("struct kvm_nested_state") == 128
    assert ffi.sizeof("kvm_nested_state_data") == 0
    assert ffi.offsetof("struct kvm_nested_state", "data") == 128


def test_bit_fields_lie_where_the_compiler_puts_them(generated: Generated, tmp_path: Path) -> None:
    names = ["vector", "delivery_mode", "dest_mode", "delivery_status", "polarity"]
    names += ["remote_irr", "trig_mode", "mask", "dest_id"]
    bits = 0xA5_00_00_00_00_01_5A_C3
    lines = "".join(f'printf("{name} %u\\n", (unsigned)entry.fields.{name});' for name in names)
    output = run_c(
        f"{generated.preamble}#include <stdio.h>\nint main(void) {{"
        f"kvm_ioapic_state_redirtbl entry = {{ .bits = {bits}ULL }}; {lines} return 0; }}",
        tmp_path,
    )
    entry = ffi.new("kvm_ioapic_state_redirtbl *", {"bits": bits})
    ours = {name: getattr(entry.fields, name) for name in names}
    assert ours == {name: int(value) for name, value in map(str.split, output.splitlines())}
    assert len(set(ours.values())) > 3


# -- headers that do not exist yet ----------------------------------------------------------------


def header_with(folder: Path, text: str) -> Compiler:
    """Return a compiler whose linux/kvm.h says more than the installed one."""
    (folder / "linux").mkdir()
    (folder / "linux" / "kvm.h").write_text(f"#include_next <linux/kvm.h>\n{text}\n")
    return Compiler(flags=[f"-I{folder}"])


def test_only_what_the_compiler_takes_for_an_integer_becomes_a_constant(tmp_path: Path) -> None:
    compiler = header_with(
        tmp_path,
        """
        #define KVM_T_BEFORE 1
        #define KVM_T_OPEN_BRACE {
        #define KVM_T_OPEN_PAREN ((1
        #define KVM_T_AFTER (KVM_T_BEFORE + sizeof(struct kvm_regs))
        #define KVM_T_TEXT "text"
        #define KVM_T_UNKNOWN GENMASK(3, 0)
        #define KVM_T_TYPE struct kvm_regs
        #define KVM_T_CALL(x) x
        #define KVM_T_EMPTY
        #define KVM_T_FLOAT 1.5
        #define KVM_T_NEGATIVE (-3)
        enum { KVM_T_ENUM = 5, KVM_T_BOTH = 6 };
        #define KVM_T_BOTH KVM_T_BOTH
        """,
    )
    found = [name for name in generate(compiler).constants if name.startswith("KVM_T_")]
    assert found == ["KVM_T_AFTER", "KVM_T_BEFORE", "KVM_T_BOTH", "KVM_T_ENUM", "KVM_T_NEGATIVE"]


def test_nested_unnamed_types_get_names_the_compiler_can_be_asked_about(tmp_path: Path) -> None:
    compiler = header_with(
        tmp_path,
        """
        struct kvm_t {
            __u8 first;
            struct {
                union {
                    struct { __u8 x; __u64 y; } deep[2 + 1];
                    __u32 z;
                };
            } outer[2], *away;
            union { __DECLARE_FLEX_ARRAY(__u8, bytes); };
        } __attribute__((packed));
        """,
    )
    generated = generate(compiler)
    assert "struct kvm_t" in generated.structs
    assert {"kvm_t_outer", "kvm_t_outer_deep"} <= set(generated.structs)
    assert "kvm_t_outer_deep deep[...];" in generated.cdef
    assert "__u8 bytes[];" in generated.cdef
    assert compiler.accepts(
        f"{generated.preamble}_Static_assert(sizeof(kvm_t_outer_deep) == 16"
        ' && sizeof(kvm_t_outer) == 48 && __builtin_offsetof(struct kvm_t, outer) == 1, "");'
    )


# -- what the build says where something is missing ----------------------------------------------


def test_missing_compiler_is_named_with_the_packages_that_have_it() -> None:
    with pytest.raises(BuildError) as caught:
        check_toolchain(Compiler("no-such-compiler"))
    assert "'no-such-compiler'" in str(caught.value)
    assert "apt install gcc" in str(caught.value)
    assert "dnf install gcc" in str(caught.value)


@pytest.mark.parametrize(
    ("present", "header", "debian", "fedora"),
    [
        ((), "<stdint.h>", "apt install libc6-dev", "dnf install glibc-devel"),
        (("stdint.h",), "<linux/kvm.h>", "apt install linux-libc-dev", "install kernel-headers"),
        (("stdint.h", "linux/kvm.h"), "<asm/kvm.h>", "linux-libc-dev", "kernel-headers"),
        (("stdint.h", "linux/kvm.h", "asm/kvm.h"), "<Python.h>", "python3-dev", "python3-devel"),
    ],
)
def test_missing_header_is_named_with_the_packages_that_have_it(
    present: tuple[str, ...],
    header: str,
    debian: str,
    fedora: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in present:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr("sysconfig.get_path", lambda which: str(tmp_path / "none"))
    with pytest.raises(BuildError) as caught:
        check_toolchain(Compiler(flags=["-nostdinc", f"-I{tmp_path}"]))
    message = str(caught.value)
    assert header in message
    assert debian in message
    assert fedora in message


@pytest.mark.parametrize("flag", ["-U__x86_64__", "-U__linux__", "-D__ILP32__"])
def test_another_platform_is_refused_before_anything_else(flag: str) -> None:
    with pytest.raises(BuildError, match="Linux on x86-64"):
        check_toolchain(Compiler(flags=[flag]))


def test_the_compiler_may_be_a_command_with_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "gcc -DKVM_T=1")
    assert Compiler().accepts("int array[KVM_T];")
