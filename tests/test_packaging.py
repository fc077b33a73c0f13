"""What an installation holds, and what setup.py decides about the native libraries."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from ovseg_fast import backends, compat

ROOT = Path(__file__).resolve().parent.parent

# Stands in for the kernels, here named NAME: CMake and Ninja run as they would, without a compiler.
CMAKE_PROJECT = """
cmake_minimum_required(VERSION 3.24)
project(NAME LANGUAGES NONE)
set(library ${CMAKE_LIBRARY_OUTPUT_DIRECTORY}/libNAME.so)
file(GLOB kernels CONFIGURE_DEPENDS *.cu *.cpp)
file(CONFIGURE OUTPUT asked CONTENT "architectures '${OVSEG_ARCHITECTURES}', emulated '${OVSEG_EMULATED}'\\n")
add_custom_command(OUTPUT ${library} DEPENDS ${kernels} asked COMMAND ${CMAKE_COMMAND} -E copy asked ${library})
add_custom_target(NAME ALL DEPENDS ${library})
"""
WITHOUT = {"OVSEG_BUILD_CUDA": "0", "OVSEG_BUILD_CPU": "0"}
ONLY_CPU = {"OVSEG_BUILD_CUDA": "0", "OVSEG_BUILD_CPU": "auto"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what packaging reads, so that nothing is built in the working tree."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("ovseg_fast", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "kernels"))
    for folder, name in (("csrc", "ovseg"), ("csrc/cpu", "ovseg_cpu")):
        (tree / folder).mkdir()
        (tree / folder / "CMakeLists.txt").write_text(CMAKE_PROJECT.replace("NAME", name))
    return tree


def tool(path: Path, code: str = "exit 0") -> Path:
    """A file that passes for a tool."""
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def nvcc(tmp_path: Path) -> Path:
    return tool(tmp_path / "cuda" / "bin" / "nvcc")


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A C++ compiler, and the only one that is named."""
    compiler = tool(tmp_path / "compiler" / "bin" / "c++")
    monkeypatch.setenv("CXX", str(compiler))
    return compiler


@pytest.fixture
def setup_py(tree: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, in an environment without any nvcc or C++ compiler."""
    spec = importlib.util.spec_from_file_location("ovseg_fast_setup", tree / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where a dataclass looks for its module
    spec.loader.exec_module(module)
    monkeypatch.chdir(tree)
    monkeypatch.setenv("PATH", "")
    for name in ("CUDA_HOME", "OVSEG_BUILD_CUDA", "OVSEG_CUDA_ARCHS", "OVSEG_BUILD_CPU", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return module


def build(tree: Path, hook: str, *path: Path, **environment: str) -> tuple[Path, str]:
    """Runs a build hook as an installer does, these folders first on PATH; the wheel and the messages."""
    code = f"from setuptools import build_meta; print(build_meta.{hook}('dist'))"
    # the folder of this Python holds the virtual environment's cmake and ninja
    folders = [*path, sysconfig.get_path("scripts"), os.environ["PATH"]]
    cuda = {"OVSEG_BUILD_CUDA": "auto", "OVSEG_CUDA_ARCHS": "", "CUDA_HOME": ""}
    environment = {**os.environ, **cuda, "OVSEG_BUILD_CPU": "0", **environment}
    environment["PATH"] = os.pathsep.join(map(str, folders))
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return tree / "dist" / result.stdout.splitlines()[-1], result.stderr


def test_wheel_holds_the_package_and_nothing_else(tree: Path) -> None:
    wheel, said = build(tree, "build_wheel", **WITHOUT)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "CUDA kernels not built" in said and "CPU kernels not built" in said
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        scripts = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    modules = {path.relative_to(tree).as_posix() for path in (tree / "ovseg_fast").rglob("*.py")}
    kernels = {f"ovseg_fast/{path.relative_to(tree).as_posix()}" for path in (tree / "kernels").rglob("*.py")}
    assert "ovseg_fast/kernels/__init__.py" in kernels
    content = {name for name in names if ".dist-info/" not in name}
    weights = {path.relative_to(tree).as_posix() for path in (tree / "ovseg_fast" / "weights").iterdir()}
    assert content == modules | kernels | weights | {"ovseg_fast/py.typed"}
    assert "ovseg-fast = ovseg_fast.cli:main" in scripts


def test_source_distribution_holds_what_a_build_reads_and_no_tests(tree: Path) -> None:
    (tree / "tests").mkdir()
    for name in ("test_import.py", "conftest.py"):
        shutil.copy(ROOT / "tests" / name, tree / "tests")
    archive, _ = build(tree, "build_sdist", **WITHOUT)
    with tarfile.open(archive) as content:
        files = {name.partition("/")[2] for name in content.getnames()}
    assert not [name for name in files if name.startswith("tests")]
    sources = [path for folder in ("ovseg_fast", "kernels", "csrc") for path in (tree / folder).rglob("*")]
    expected = {path.relative_to(tree).as_posix() for path in sources if path.is_file()}
    assert {*expected, "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= files


@pytest.mark.usefixtures("compiler")
def test_wheel_with_the_cpu_kernels_is_for_one_platform_and_any_python(tree: Path) -> None:
    wheel, said = build(tree, "build_wheel", **ONLY_CPU)
    assert "ovseg-fast: CPU kernels built with" in said and "CUDA kernels not built" in said
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        libraries = {name for name in archive.namelist() if name.endswith(".so")}
        assert not [name for name in archive.namelist() if name.startswith(("csrc", "build"))]
    assert libraries == {"ovseg_fast/libovseg_cpu.so"}


def test_wheel_with_the_native_library_is_for_one_platform_and_any_python(tree: Path, nvcc: Path) -> None:
    wheel, said = build(tree, "build_wheel", CUDA_HOME=str(nvcc.parent.parent))
    assert "ovseg-fast: CUDA kernels built with" in said  # an nvcc on PATH comes first
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "ovseg_fast/libovseg.so" in archive.namelist()


def test_editable_install_builds_in_place_and_again_after_its_ninja_is_gone(tree: Path, nvcc: Path) -> None:
    library = tree / "ovseg_fast" / "libovseg.so"
    ninja = shutil.which("ninja", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    assert ninja is not None, "ninja is in the dev extra"
    isolated = tree / "isolated"
    isolated.mkdir()
    (isolated / "ninja").symlink_to(ninja)
    build(tree, "build_editable", nvcc.parent, isolated)
    assert library.exists()

    shutil.rmtree(isolated)
    library.unlink()
    build(tree, "build_editable", nvcc.parent)
    assert library.exists()


def test_failing_native_build_fails_the_installation(tree: Path, nvcc: Path) -> None:
    (tree / "csrc" / "CMakeLists.txt").write_text('message(FATAL_ERROR "broken project")')
    with pytest.raises(AssertionError, match="broken project") as caught:
        build(tree, "build_editable", nvcc.parent)
    assert "building the CUDA kernels failed (1); OVSEG_BUILD_CUDA=0 installs without" in str(caught.value)


@pytest.mark.usefixtures("compiler")
def test_failing_build_of_the_cpu_kernels_says_how_to_install_without(tree: Path) -> None:
    (tree / "csrc" / "cpu" / "CMakeLists.txt").write_text('message(FATAL_ERROR "broken project")')
    with pytest.raises(AssertionError, match="broken project") as caught:
        build(tree, "build_editable", **ONLY_CPU)
    assert "building the CPU kernels failed (1); OVSEG_BUILD_CPU=0 installs without" in str(caught.value)


def test_build_takes_the_architectures_asked_for_and_nothing_of_the_emulator(tree: Path, nvcc: Path) -> None:
    library = tree / "ovseg_fast" / "libovseg.so"
    for asked, expected in (("", ""), ("80 90a", "80;90a"), ("90a", "90a")):
        build(tree, "build_editable", nvcc.parent, OVSEG_CUDA_ARCHS=asked)
        assert library.read_text() == f"architectures '{expected}', emulated 'OFF'\n"


def test_repeated_build_is_incremental(tree: Path, nvcc: Path) -> None:
    library = tree / "ovseg_fast" / "libovseg.so"
    kernel = tree / "csrc" / "cost_volume.cu"
    kernel.write_text("")
    build(tree, "build_editable", nvcc.parent)
    first = library.stat().st_mtime_ns
    build(tree, "build_editable", nvcc.parent)
    assert library.stat().st_mtime_ns == first
    os.utime(kernel)
    build(tree, "build_editable", nvcc.parent)
    assert library.stat().st_mtime_ns > first


@pytest.mark.parametrize(
    "entry",
    [
        "CMAKE_HOME_DIRECTORY:INTERNAL=/elsewhere/csrc",
        "CMAKE_CACHEFILE_DIR:INTERNAL=/elsewhere/build/csrc",
        "CMAKE_CUDA_COMPILER:FILEPATH=/elsewhere/nvcc",
        "CMAKE_CXX_COMPILER:FILEPATH=/elsewhere/c++",
        "CMAKE_GENERATOR:INTERNAL=Unix Makefiles",
        "CMAKE_COMMAND:INTERNAL=/elsewhere/cmake",
        "CMAKE_MAKE_PROGRAM:FILEPATH=/elsewhere/ninja",
    ],
)
def test_what_an_earlier_build_left_does_not_break_the_next(tree: Path, nvcc: Path, entry: str) -> None:
    """A moved checkout, another compiler, tools of an isolated environment that is gone."""
    build(tree, "build_editable", nvcc.parent)
    library = tree / "ovseg_fast" / "libovseg.so"
    library.unlink()
    cache = tree / "build" / "csrc" / "CMakeCache.txt"
    name = entry.partition(":")[0]
    lines = [entry if line.startswith(f"{name}:") else line for line in cache.read_text().splitlines()]
    cache.write_text("\n".join(lines if entry in lines else [*lines, entry]) + "\n")
    build(tree, "build_editable", nvcc.parent)
    assert library.exists()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    "entry", ["CMAKE_HOME_DIRECTORY:INTERNAL=/elsewhere/csrc/cpu", "CMAKE_CXX_COMPILER:FILEPATH=/elsewhere/c++"]
)
def test_what_an_earlier_build_of_the_cpu_kernels_left_does_not_break_the_next(tree: Path, entry: str) -> None:
    build(tree, "build_editable", **ONLY_CPU)
    library = tree / "ovseg_fast" / "libovseg_cpu.so"
    library.unlink()
    cache = tree / "build" / "cpu" / "CMakeCache.txt"
    name = entry.partition(":")[0]
    lines = [line for line in cache.read_text().splitlines() if not line.startswith(f"{name}:")]
    cache.write_text("\n".join([*lines, entry]) + "\n")
    build(tree, "build_editable", **ONLY_CPU)
    assert library.exists()


def test_a_copied_tree_builds_where_it_is(tree: Path, nvcc: Path, tmp_path: Path) -> None:
    build(tree, "build_editable", nvcc.parent)
    copy = tmp_path / "copy"
    shutil.copytree(tree, copy)
    shutil.rmtree(tree)
    (copy / "ovseg_fast" / "libovseg.so").unlink()
    build(copy, "build_editable", nvcc.parent)
    assert (copy / "ovseg_fast" / "libovseg.so").exists()


def test_the_oldest_versions_that_are_tried_are_those_allowed() -> None:
    """All lower bounds but those of torch and Triton, see docs/install.md."""
    pattern = r'"([a-z_]+)>=([\d.]+)"'
    project = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]")[0].partition("[project]")[2]
    allowed = dict(re.findall(pattern, re.sub(r"dev = \[.*?\n\]", "", project, flags=re.S)))
    tried = dict(re.findall(r"^([a-z_]+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), flags=re.M))
    assert {allowed.pop("torch"), allowed.pop("triton")} == {"2.8", ".".join(map(str, backends.TRITON))}
    assert allowed.keys() == tried.keys()
    assert allowed["open_clip_torch"] == ".".join(map(str, compat.OLDEST_OPEN_CLIP))
    for name, bound in allowed.items():
        assert (tried[name] + ".0.0").startswith(bound + "."), name


@pytest.fixture
def would_run(tree: Path) -> Callable[..., str]:
    """What `make TARGET` would run in a copy of the tree, these folders first on PATH."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    for name in ("Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, tree)
    tools = tree / "tools"
    tools.mkdir()
    for name in ("make", "find", "sh"):
        (tools / name).symlink_to(str(shutil.which(name)))

    def would_run(target: str, *path: Path) -> str:
        environment = {"PATH": os.pathsep.join(map(str, (*path, tools)))}
        return subprocess.run(
            ["make", "-n", target], cwd=tree, env=environment, capture_output=True, text=True, check=True
        ).stdout

    return would_run


def test_make_builds_again_after_a_change_of_csrc_or_of_the_compilers_only(
    would_run: Callable[..., str], tree: Path, nvcc: Path, compiler: Path
) -> None:
    (tree / ".venv").mkdir()
    assert "pip install" in would_run("venv") and "build_native" in would_run("venv")
    (tree / ".venv" / "installed").touch()
    for path, stamp in (
        ([], "kernels"),
        ([compiler.parent], "kernels-cpu"),
        ([nvcc.parent], "kernels-cuda"),
        ([nvcc.parent, compiler.parent], "kernels-cuda-cpu"),
    ):
        assert "build_native --inplace" in would_run("venv", *path)
        (tree / ".venv" / stamp).touch()
        assert "python" not in would_run("venv", *path)
    (tree / "csrc" / "device").mkdir()
    for source in ("device/tiles.cuh", "cpu/cost_volume.cpp"):
        header = tree / "csrc" / source
        header.touch()
        later = header.stat().st_mtime + 10
        os.utime(header, (later, later))
        commands = would_run("venv", nvcc.parent)
        assert "build_native --inplace" in commands and "pip" not in commands
        header.unlink()


@pytest.mark.parametrize("target", ["demo", "lint", "reproduce", "claims"])
def test_make_does_not_wait_for_cuda_where_nothing_needs_it(
    would_run: Callable[..., str], nvcc: Path, target: str
) -> None:
    commands = would_run(target, nvcc.parent)
    assert "build_native" not in commands
    assert all("OVSEG_BUILD_CUDA=0" in line for line in commands.splitlines() if "-e '.[dev]'" in line)
    assert "-e '.[dev]'" in commands


@pytest.mark.parametrize("target", ["test", "slow", "bench"])
def test_make_builds_the_kernels_that_it_tests(would_run: Callable[..., str], nvcc: Path, target: str) -> None:
    assert "build_native --inplace" in would_run(target, nvcc.parent)


@pytest.fixture
def decide(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """The decision with these environment variables."""

    def decide(**environment: object) -> tuple[str | None, str]:
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        return setup_py.native_compiler()

    return decide


def test_nvcc_is_found_on_path_and_in_cuda_home(decide: Callable, nvcc: Path) -> None:
    built = (str(nvcc), f"CUDA kernels built with {nvcc}")
    assert decide(CUDA_HOME=nvcc.parent.parent) == built
    assert decide(CUDA_HOME="", PATH=nvcc.parent) == built
    assert decide(PATH=nvcc.parent, OVSEG_BUILD_CUDA="1") == built


def test_without_nvcc_it_installs_without_the_library_and_says_so(decide: Callable) -> None:
    assert decide() == (
        None,
        "CUDA kernels not built, no nvcc found; put nvcc on PATH or name CUDA_HOME, then "
        "`pip install --force-reinstall --no-deps -e .`",
    )


def test_build_can_be_switched_off(decide: Callable, nvcc: Path) -> None:
    said = "CUDA kernels not built, OVSEG_BUILD_CUDA=0; unset it to build them"
    assert decide(PATH=nvcc.parent, OVSEG_BUILD_CUDA="0") == (None, said)


def test_forced_build_without_nvcc_is_an_error(decide: Callable) -> None:
    with pytest.raises(SystemExit, match="OVSEG_BUILD_CUDA=1, but nvcc is neither on PATH nor in CUDA_HOME"):
        decide(OVSEG_BUILD_CUDA="1")


@pytest.fixture
def decide_cpu(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """The decision about the CPU kernels on some machine with these environment variables."""

    def decide(machine: str = "x86_64", system: str = "linux", **environment: object) -> tuple[str | None, str]:
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(setup_py.platform, "machine", lambda: machine)
        monkeypatch.setattr(setup_py.sys, "platform", system)
        return setup_py.cpu_compiler()

    return decide


@pytest.mark.parametrize("machine", ["x86_64", "AArch64"])
def test_a_cpp_compiler_is_found_on_path_and_in_cxx(
    decide_cpu: Callable, compiler: Path, tmp_path: Path, machine: str
) -> None:
    built = (str(compiler), f"CPU kernels built with {compiler}")
    assert decide_cpu(machine, CXX=compiler) == built
    assert decide_cpu(machine, CXX="", PATH=compiler.parent) == built
    for name in ("g++", "clang++"):
        other = tool(compiler.parent / name / name)
        assert decide_cpu(machine, PATH=other.parent)[0] == str(other)
    assert decide_cpu(machine, CXX="icpc", PATH=tmp_path)[0] is None
    assert decide_cpu(machine, CXX=compiler, PATH=tmp_path, OVSEG_BUILD_CPU="1") == built


REFUSED = [
    ({}, "no C++ compiler found (c++, g++, clang++); install one, then `pip install --force-reinstall --no-deps -e .`"),
    ({"machine": "ppc64le"}, "they are for Linux on x86_64, aarch64, not for linux on ppc64le"),
    ({"system": "darwin", "machine": "arm64"}, "they are for Linux on x86_64, aarch64, not for darwin on arm64"),
    (
        {"CXX": "old"},
        "{old} does not know C++17 or this machine's instruction sets; install GCC 11, clang 12 or newer, then "
        "`pip install --force-reinstall --no-deps -e .`",
    ),
]


@pytest.mark.parametrize(("machine", "reason"), REFUSED)
def test_without_a_compiler_it_installs_without_cpu_kernels_and_says_so(
    decide_cpu: Callable, tmp_path: Path, machine: dict[str, str], reason: str
) -> None:
    """In one line; asked for in particular it is an error."""
    old = tool(tmp_path / "old" / "c++", 'case "$*" in *x86-64-v4*) exit 1;; esac')
    if "CXX" in machine:
        machine = {**machine, "CXX": str(old)}
        reason = reason.format(old=old)
    assert decide_cpu(**machine) == (None, f"CPU kernels not built, {reason}")
    with pytest.raises(SystemExit, match=f"^{re.escape('OVSEG_BUILD_CPU=1, but ' + reason)}$"):
        decide_cpu(**machine, OVSEG_BUILD_CPU="1")


def test_build_of_the_cpu_kernels_can_be_switched_off(decide_cpu: Callable, compiler: Path) -> None:
    said = "CPU kernels not built, OVSEG_BUILD_CPU=0; unset it to build them"
    assert decide_cpu(CXX=compiler, OVSEG_BUILD_CPU="0") == (None, said)
    with pytest.raises(SystemExit, match="OVSEG_BUILD_CPU is 'yes'; expected 0, 1 or auto"):
        decide_cpu(OVSEG_BUILD_CPU="yes")


def test_unknown_build_choice_is_an_error(decide: Callable) -> None:
    with pytest.raises(SystemExit, match="OVSEG_BUILD_CUDA is 'yes'; expected 0, 1 or auto"):
        decide(OVSEG_BUILD_CUDA="yes")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("", []), (" ", []), ("80", ["80"]), ("80 90a", ["80", "90a"]), ("80;90a,120", ["80", "90a", "120"]),
     ("80 80;", ["80"]), ("100f", ["100f"])],
)  # fmt: skip
def test_architectures_are_read(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: str, expected: list[str]
) -> None:
    monkeypatch.setenv("OVSEG_CUDA_ARCHS", asked)
    assert setup_py.architectures() == expected


@pytest.mark.parametrize("asked", ["9.0", "sm_80", "75", "80 all", "a90"])
def test_unknown_architectures_are_an_error(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv("OVSEG_CUDA_ARCHS", asked)
    with pytest.raises(SystemExit, match=f"OVSEG_CUDA_ARCHS is '{asked}'; expected compute capabilities from 80 on"):
        setup_py.architectures()


def test_missing_build_tools_are_named(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, nvcc: Path) -> None:
    monkeypatch.setenv("PATH", str(nvcc.parent))
    monkeypatch.setattr(setup_py.sysconfig, "get_path", lambda name: str(nvcc.parent))
    command = setup_py.BuildNative(setup_py.NativeDistribution())
    command.ensure_finalized()
    with pytest.raises(SystemExit, match=r"^cmake and ninja not found; `pip install cmake ninja`"):
        command.run()
