"""The package map and the optional build of csrc; the rest is in pyproject.toml. Nothing here needs torch."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

CSRC = Path("csrc")
REINSTALL = "`pip install --force-reinstall --no-deps -e .`"
HOW = f"put nvcc on PATH or name CUDA_HOME, then {REINSTALL}"
MACHINES = {"x86_64": "-march=x86-64-v4 -mavx512bf16", "aarch64": ""}  # with CPU kernels; the newest that they ask for


def wanted(variable: str) -> str:
    """What a variable of the environment says about building kernels: "0", "1" or "auto"."""
    value = os.environ.get(variable, "auto")
    if value not in ("0", "1", "auto"):
        sys.exit(f"{variable} is {value!r}; expected 0, 1 or auto")
    return value


def native_compiler() -> tuple[str | None, str]:
    """The nvcc to build csrc with, or None, and one line that says why."""
    build = wanted("OVSEG_BUILD_CUDA")
    if build == "0":
        return None, "CUDA kernels not built, OVSEG_BUILD_CUDA=0; unset it to build them"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '')}/bin")
    if not nvcc and build == "1":
        sys.exit("OVSEG_BUILD_CUDA=1, but nvcc is neither on PATH nor in CUDA_HOME/bin")
    return nvcc, f"CUDA kernels built with {nvcc}" if nvcc else f"CUDA kernels not built, no nvcc found; {HOW}"


def cpu_compiler() -> tuple[str | None, str]:
    """The C++ compiler to build csrc/cpu with, or None, and one line that says why."""
    build = wanted("OVSEG_BUILD_CPU")
    if build == "0":
        return None, "CPU kernels not built, OVSEG_BUILD_CPU=0; unset it to build them"
    machine = platform.machine().lower()
    reason = None
    if machine not in MACHINES or not sys.platform.startswith("linux"):
        reason = f"they are for Linux on {', '.join(MACHINES)}, not for {sys.platform} on {machine}"
    names = [os.environ.get("CXX") or "c++", "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if not compiler:
        reason = reason or f"no C++ compiler found ({', '.join(names)}); install one, then {REINSTALL}"
    elif not reason and not compiles(compiler, *MACHINES[machine].split()):
        newer = "GCC 11, clang 12 or newer"
        reason = f"{compiler} does not know C++17 or this machine's instruction sets; install {newer}, then {REINSTALL}"
    if reason and build == "1":
        sys.exit(f"OVSEG_BUILD_CPU=1, but {reason}")
    return (
        None if reason else compiler,
        f"CPU kernels not built, {reason}" if reason else f"CPU kernels built with {compiler}",
    )


def compiles(compiler: str, *options: str) -> bool:
    """Whether a C++ compiler takes these options."""
    command = [compiler, "-std=c++17", *options, "-x", "c++", "-fsyntax-only", os.devnull]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def architectures() -> list[str]:
    """The architectures in OVSEG_CUDA_ARCHS, as nvcc names them; empty to build all that nvcc knows."""
    asked = os.environ.get("OVSEG_CUDA_ARCHS", "")
    names = re.split(r"[\s,;]+", asked.strip(" ,;")) if asked.strip(" ,;") else []
    for name in names:
        number = re.fullmatch(r"(\d{2,3})[af]?", name)
        if not number or int(number[1]) < 80:
            sys.exit(f'OVSEG_CUDA_ARCHS is {asked!r}; expected compute capabilities from 80 on, such as "80 90a"')
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Kernels:
    """One of the two libraries: where CMake finds and builds it, and what its compiler is called there."""

    name: str
    variable: str  # of the environment: whether to build it
    source: Path
    folder: Path
    compiler: str
    options: Callable[[], dict[str, str]]


CUDA = Kernels(
    "CUDA",
    "OVSEG_BUILD_CUDA",
    CSRC,
    Path("build", "csrc"),
    "CMAKE_CUDA_COMPILER",
    lambda: {"OVSEG_ARCHITECTURES": ";".join(architectures()), "OVSEG_EMULATED": "OFF"},
)
CPU = Kernels("CPU", "OVSEG_BUILD_CPU", CSRC / "cpu", Path("build", "cpu"), "CMAKE_CXX_COMPILER", dict)


def is_stale(kernels: Kernels, compiler: str) -> bool:
    """Whether CMake's cache is of another folder or generator, or of a compiler that is gone."""
    cache = kernels.folder / "CMakeCache.txt"
    if not cache.exists():
        return False
    lines = (line.partition("=") for line in cache.read_text().splitlines() if ":" in line.partition("=")[0])
    entries = {name.partition(":")[0]: value for name, _, value in lines}
    expected = {
        "CMAKE_HOME_DIRECTORY": kernels.source.resolve(),
        "CMAKE_CACHEFILE_DIR": cache.parent.resolve(),
        kernels.compiler: compiler,
        "CMAKE_GENERATOR": "Ninja",
    }
    return any(name in entries and entries[name] != str(value) for name, value in expected.items()) or not shutil.which(
        entries.get("CMAKE_CXX_COMPILER", sys.executable)
    )


class BuildNative(Command):
    """Compiles csrc into ovseg_fast. A command of its own: setuptools only warns if build_py fails."""

    description = "compile the CUDA kernels of csrc if nvcc is found, those for CPUs if a C++ compiler is"
    user_options = [("inplace", "i", "put the libraries beside the sources, for an editable installation")]
    boolean_options = ["inplace"]
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = ""
        self.inplace = False

    def finalize_options(self) -> None:
        self.build_lib = self.get_finalized_command("build").build_lib

    def run(self) -> None:
        for kernels, (compiler, reason) in {CPU: cpu_compiler(), CUDA: native_compiler()}.items():
            if compiler:
                self.compile(kernels, compiler)
            print(f"ovseg-fast: {reason}", file=sys.stderr)

    def compile(self, kernels: Kernels, compiler: str) -> None:
        in_place = self.inplace or self.editable_mode
        target = Path("" if in_place else self.build_lib, "ovseg_fast").resolve()
        folders = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
        tools = {name: shutil.which(name, path=folders) for name in ("cmake", "ninja")}
        if missing := [name for name, path in tools.items() if path is None]:
            sys.exit(
                f"{' and '.join(missing)} not found; `pip install {' '.join(missing)}`, or set {kernels.variable}=0"
            )
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tools["ninja"],  # every time: the last one may be gone with an isolated environment
            kernels.compiler: compiler,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target,
            **kernels.options(),
        }
        fresh = ["--fresh"] if is_stale(kernels, compiler) else []
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        configure = [tools["cmake"], *fresh, "-S", kernels.source, "-B", kernels.folder, "-G", "Ninja", *definitions]
        for command in (configure, [tools["cmake"], "--build", kernels.folder]):
            if code := subprocess.run(command, check=False).returncode:
                sys.exit(
                    f"ovseg-fast: building the {kernels.name} kernels failed ({code}); {kernels.variable}=0 installs "
                    "without"
                )

    def get_source_files(self) -> list[str]:
        return [str(path) for path in sorted(CSRC.rglob("*")) if path.is_file()]


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return native_compiler()[0] is not None or cpu_compiler()[0] is not None


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
