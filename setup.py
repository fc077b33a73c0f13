"""The package map and the optional build of csrc; the rest is in pyproject.toml. Nothing here needs torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

CSRC = Path("csrc")


def native_compiler() -> tuple[str | None, str]:
    """The nvcc to build csrc with, or None, and why, in one line."""
    wanted = os.environ.get("OVSEG_BUILD_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"OVSEG_BUILD_CUDA is {wanted!r}; expected 0, 1 or auto")
    if not (CSRC / "CMakeLists.txt").exists():
        return None, "no native library to build, csrc holds no CMakeLists.txt"
    if wanted == "0":
        return None, "native library not built, OVSEG_BUILD_CUDA=0"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '')}/bin")
    if not nvcc and wanted == "1":
        sys.exit("OVSEG_BUILD_CUDA=1, but nvcc is neither on PATH nor in CUDA_HOME/bin")
    return nvcc, f"native library built with {nvcc}" if nvcc else "native library not built, no nvcc found"


class BuildNative(Command):
    """Compiles csrc into ovseg_fast/libovseg.so; of its own, as setuptools only warns when build_py fails."""

    user_options: list[tuple[str, str, str]] = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = ""

    def finalize_options(self) -> None:
        self.build_lib = self.get_finalized_command("build").build_lib

    def run(self) -> None:
        nvcc, reason = native_compiler()
        if nvcc:
            target = Path("" if self.editable_mode else self.build_lib, "ovseg_fast").resolve()
            # Ninja is named each time: the last one may have lived in an isolated environment, now gone.
            options = ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"]
            options += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}"]
            subprocess.run(["cmake", "-S", CSRC, "-B", "build/csrc", "-G", "Ninja", *options], check=True)
            subprocess.run(["cmake", "--build", "build/csrc"], check=True)
        print(f"ovseg-fast: {reason}", file=sys.stderr)

    def get_source_files(self) -> list[str]:
        return [str(path) for path in sorted(CSRC.rglob("*")) if path.is_file()]


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return native_compiler()[0] is not None


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()  # the library ties a wheel to its platform, not to a Python version
        return tag if self.root_is_pure else ("py3", "none", tag[2])


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["ovseg_fast", "ovseg_fast.*"]), "ovseg_fast.kernels"],
        package_dir={"ovseg_fast.kernels": "kernels"},
        distclass=NativeDistribution,
        ext_modules=[],
        cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel},
    )
