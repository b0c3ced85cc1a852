"""What pyproject.toml cannot say: the compiled module, and guests/ as a folder of the package."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "csrc"))

#: Free-threaded CPython has no stable ABI before 3.15, and a debug build has none at all.
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED") and not hasattr(sys, "gettotalrefcount")


class BuildNative(build_ext):
    """Generates cffi's C file when something is compiled, and only then: an sdist needs no gcc.

    Environment: ``PYKVM_WERROR=1`` makes warnings in our C errors, ``PYKVM_SANITIZE=1`` builds
    with ASan and UBSan.
    """

    def run(self) -> None:
        """Always build afresh: setuptools knows neither our headers nor the environment."""
        self.force = True
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Generate, compile on all processors, ours with warnings; setuptools does the rest."""
        import build_ffi
        from gen_kvm_cdef import BuildError

        folder = os.path.join(self.build_temp, "generated")
        try:
            build_ffi.write(folder)
        except BuildError as error:
            sys.exit(f"\n{error}\n")
        flags = ["-std=gnu11", "-O2", "-fvisibility=hidden"]
        if os.environ.get("PYKVM_SANITIZE") == "1":
            flags += ["-g", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
            ext.extra_link_args = flags
        warnings = ["-Wall", "-Wextra"]
        if os.environ.get("PYKVM_WERROR") == "1":
            warnings.append("-Werror")
        ext.include_dirs = ["csrc", folder]
        limited = [("Py_LIMITED_API", "0x030b0000")] if ABI3 else []
        generated = (os.path.join(folder, "_native.c"), ext.define_macros, flags)
        ours = [(source, limited, flags + warnings) for source in build_ffi.sources()]

        def compiled(source: str, macros: list[tuple[str, str]], flags: list[str]) -> list[str]:
            made: list[str] = self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                macros=macros,
                extra_postargs=flags,
            )
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # the largest first
            made = pool.map(compiled, *zip(generated, *ours, strict=True))
            ext.extra_objects = [name for names in made for name in names]
        super().build_extension(ext)


class BuildPackage(build_py):
    """Puts guests/ into the package. A checkout, also an editable one, uses it where it lies."""

    def run(self) -> None:
        """Build the packages, then copy the folder."""
        super().run()
        if not self.editable_mode:
            shutil.copytree(
                os.path.join(HERE, "guests"),
                os.path.join(self.build_lib, "pykvm", "guests"),
                ignore=shutil.ignore_patterns("__pycache__", "*.o"),
                dirs_exist_ok=True,
            )


setup(
    ext_modules=[
        Extension(
            "pykvm._abi._native",
            sources=[],
            define_macros=[] if ABI3 else [("_CFFI_NO_LIMITED_API", "1")],
            py_limited_api=ABI3,
        )
    ],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPackage},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if ABI3 else {},
)
