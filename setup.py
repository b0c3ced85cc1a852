"""The compiled module, and the folder of guests inside the package. The rest: pyproject.toml."""

from __future__ import annotations

import os
import sys
import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "csrc"))

#: Free-threaded CPython has no stable ABI that cffi could use.
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")


class BuildNative(build_ext):
    """Generates cffi's C file only when something is compiled: an sdist needs no compiler."""

    def build_extension(self, ext: Extension) -> None:
        """Generate, compile our C with its own flags, then let setuptools do the rest."""
        import build_ffi

        folder = os.path.join(self.build_temp, "generated")
        try:
            build_ffi.write(folder)
        except build_ffi.BuildError as error:
            sys.exit(f"\n{error}\n")
        # No -Wall for cffi's file, which is not ours to mend.
        strict = ["-Werror"] if os.environ.get("PYKVM_WERROR") == "1" else []
        sanitize = ["-g", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
        common = ["-std=gnu11", "-O2", "-fvisibility=hidden"]
        if os.environ.get("PYKVM_SANITIZE") == "1":
            common += sanitize
            ext.extra_link_args = sanitize
        ext.include_dirs = ["csrc", folder]
        ext.extra_objects = self.compiler.compile(
            build_ffi.sources(),
            output_dir=self.build_temp,
            include_dirs=ext.include_dirs,
            extra_postargs=[*common, "-Wall", "-Wextra", *strict],
        )
        ext.sources = [os.path.join(folder, "_native.c")]
        ext.extra_compile_args = common
        super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "pykvm._abi._native",
            sources=[],
            define_macros=[] if ABI3 else [("_CFFI_NO_LIMITED_API", "1")],
            py_limited_api=ABI3,
        )
    ],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if ABI3 else {},
)
