"""The package map and the optional build of csrc; the rest is in pyproject.toml. Nothing here needs torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

CSRC = Path("csrc")
HOW = "put nvcc on PATH or name CUDA_HOME, then `pip install --force-reinstall --no-deps -e .`"


def native_compiler() -> tuple[str | None, str]:
    """The nvcc to build csrc with, or None, and one line that says why."""
    wanted = os.environ.get("OVSEG_BUILD_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"OVSEG_BUILD_CUDA is {wanted!r}; expected 0, 1 or auto")
    if wanted == "0":
        return None, "CUDA kernels not built, OVSEG_BUILD_CUDA=0; unset it to build them"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '')}/bin")
    if not nvcc and wanted == "1":
        sys.exit("OVSEG_BUILD_CUDA=1, but nvcc is neither on PATH nor in CUDA_HOME/bin")
    return nvcc, f"CUDA kernels built with {nvcc}" if nvcc else f"CUDA kernels not built, no nvcc found; {HOW}"


def architectures() -> list[str]:
    """The architectures in OVSEG_CUDA_ARCHS, as nvcc names them; empty to build all that nvcc knows."""
    wanted = os.environ.get("OVSEG_CUDA_ARCHS", "")
    names = re.split(r"[\s,;]+", wanted.strip(" ,;")) if wanted.strip(" ,;") else []
    for name in names:
        number = re.fullmatch(r"(\d{2,3})[af]?", name)
        if not number or int(number[1]) < 80:
            sys.exit(f'OVSEG_CUDA_ARCHS is {wanted!r}; expected compute capabilities from 80 on, such as "80 90a"')
    return list(dict.fromkeys(names))


def is_stale(cache: Path, nvcc: str) -> bool:
    """Whether CMake's cache is of another folder or generator, or of a compiler that is gone."""
    if not cache.exists():
        return False
    lines = (line.partition("=") for line in cache.read_text().splitlines() if ":" in line.partition("=")[0])
    entries = {name.partition(":")[0]: value for name, _, value in lines}
    expected = {
        "CMAKE_HOME_DIRECTORY": CSRC.resolve(),
        "CMAKE_CACHEFILE_DIR": cache.parent.resolve(),
        "CMAKE_CUDA_COMPILER": nvcc,
        "CMAKE_GENERATOR": "Ninja",
    }
    return any(name in entries and entries[name] != str(value) for name, value in expected.items()) or not shutil.which(
        entries.get("CMAKE_CXX_COMPILER", sys.executable)
    )


class BuildNative(Command):
    """Compiles csrc into ovseg_fast/libovseg.so. A command of its own: setuptools only warns if build_py fails."""

    description = "compile the CUDA kernels of csrc if nvcc is found"
    user_options = [("inplace", "i", "put the library beside the sources, for an editable installation")]
    boolean_options = ["inplace"]
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = ""
        self.inplace = False

    def finalize_options(self) -> None:
        self.build_lib = self.get_finalized_command("build").build_lib

    def run(self) -> None:
        nvcc, reason = native_compiler()
        if nvcc:
            self.compile(nvcc)
        print(f"ovseg-fast: {reason}", file=sys.stderr)

    def compile(self, nvcc: str) -> None:
        in_place = self.inplace or self.editable_mode
        target = Path("" if in_place else self.build_lib, "ovseg_fast").resolve()
        folders = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
        tools = {name: shutil.which(name, path=folders) for name in ("cmake", "ninja")}
        if missing := [name for name, path in tools.items() if path is None]:
            sys.exit(f"{' and '.join(missing)} not found; `pip install {' '.join(missing)}`, or set OVSEG_BUILD_CUDA=0")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tools["ninja"],  # every time: the last one may be gone with an isolated environment
            "CMAKE_CUDA_COMPILER": nvcc,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target,
            "OVSEG_ARCHITECTURES": ";".join(architectures()),
            "OVSEG_EMULATED": "OFF",
        }
        folder = Path("build", "csrc")
        fresh = ["--fresh"] if is_stale(folder / "CMakeCache.txt", nvcc) else []
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        configure = [tools["cmake"], *fresh, "-S", CSRC, "-B", folder, "-G", "Ninja", *definitions]
        for command in (configure, [tools["cmake"], "--build", folder]):
            if code := subprocess.run(command, check=False).returncode:
                sys.exit(f"ovseg-fast: building the CUDA kernels failed ({code}); OVSEG_BUILD_CUDA=0 installs without")

    def get_source_files(self) -> list[str]:
        return [str(path) for path in sorted(CSRC.rglob("*")) if path.is_file()]


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return native_compiler()[0] is not None


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()  # the library depends on the platform, not on the Python version
        return tag if self.root_is_pure else ("py3", "none", tag[2])


if __name__ == "__main__":
    setup(
        packages=[
            *find_packages(include=["ovseg_fast", "ovseg_fast.*"]),
            "ovseg_fast.kernels",
            "ovseg_fast.kernels.common",
        ],
        package_dir={"ovseg_fast.kernels": "kernels"},
        distclass=NativeDistribution,
        ext_modules=[],
        cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel},
    )
