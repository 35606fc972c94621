"""Builds the optional C++ kernels. All metadata is in pyproject.toml.

The kernels become memsave/_libmemsave.so (.dylib, .dll), a plain shared library that memsave loads with ctypes. It
depends on neither Python nor torch, so one wheel, py3-none-<platform>, serves all their versions. Without a C++
compiler the build goes on and gives a pure wheel, py3-none-any; memsave then runs everything in PyTorch.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARY = "memsave._libmemsave"
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
# Contraction to fused multiply-adds would make results depend on the CPU. No code reads the floating-point exception
# flags, and without them compilers can vectorize the branches of a selection.
UNIX_FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fno-trapping-math"]
UNIX_FLAGS += ["-fvisibility=hidden", "-Wall", "-Wextra"]
WINDOWS_FLAGS = ["/std:c++17", "/O2", "/fp:precise"]


class BuildLibrary(build_ext):
    """A plain shared library: no ABI tag in its name, no Python entry point."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + SUFFIX

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols


class WheelTag(bdist_wheel):
    """py3-none-<platform> with the library, py3-none-any without."""

    def write_wheelfile(self, *args, **kwargs) -> None:
        self.root_is_pure = not self._has_library()
        super().write_wheelfile(*args, **kwargs)

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", platform if self._has_library() else "any"

    def _has_library(self) -> bool:
        built = self.get_finalized_command("build_ext")
        return Path(built.get_ext_fullpath(LIBRARY)).exists()


sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
flags = WINDOWS_FLAGS if sys.platform == "win32" else UNIX_FLAGS
headers = sorted(str(path) for path in Path("csrc").glob("*.h"))
library = Extension(LIBRARY, sources, depends=headers, language="c++", extra_compile_args=flags, optional=True)
setup(ext_modules=[library], cmdclass={"build_ext": BuildLibrary, "bdist_wheel": WheelTag})
