"""What an installation holds, and what setup.py decides about the native library."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Stands in for the kernels: CMake and Ninja run as they would, without a compiler.
CMAKE_PROJECT = """
cmake_minimum_required(VERSION 3.24)
project(ovseg LANGUAGES NONE)
set(library ${CMAKE_LIBRARY_OUTPUT_DIRECTORY}/libovseg.so)
add_custom_command(OUTPUT ${library} COMMAND ${CMAKE_COMMAND} -E touch ${library})
add_custom_target(ovseg ALL DEPENDS ${library})
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what packaging reads, so that nothing is built in the working tree."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("ovseg_fast", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (tree / "csrc").mkdir()
    return tree


@pytest.fixture
def nvcc(tmp_path: Path) -> Path:
    """A file that passes for nvcc."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture
def setup_py(tree: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, in an environment without any nvcc."""
    spec = importlib.util.spec_from_file_location("ovseg_fast_setup", tree / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tree)
    monkeypatch.setenv("PATH", "")
    for name in ("CUDA_HOME", "OVSEG_BUILD_CUDA"):
        monkeypatch.delenv(name, raising=False)
    return module


def build(tree: Path, hook: str, *path: Path, **environment: str) -> tuple[Path, str]:
    """Runs a build hook as an installer does, these folders first on PATH; the wheel and the messages."""
    code = f"from setuptools import build_meta; print(build_meta.{hook}('dist'))"
    # the folder of this Python holds the virtual environment's cmake and ninja
    folders = [*path, sysconfig.get_path("scripts"), os.environ["PATH"]]
    environment = {**os.environ, "OVSEG_BUILD_CUDA": "auto", "CUDA_HOME": "", **environment}
    environment["PATH"] = os.pathsep.join(map(str, folders))
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return tree / "dist" / result.stdout.splitlines()[-1], result.stderr


def test_wheel_holds_the_package_and_nothing_else(tree: Path) -> None:
    wheel, said = build(tree, "build_wheel")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "no native library to build" in said
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


def test_wheel_with_the_native_library_is_for_one_platform_and_any_python(tree: Path, nvcc: Path) -> None:
    (tree / "csrc" / "CMakeLists.txt").write_text(CMAKE_PROJECT)
    wheel, said = build(tree, "build_wheel", CUDA_HOME=str(nvcc.parent.parent))
    assert "native library built with" in said
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "ovseg_fast/libovseg.so" in archive.namelist()


def test_editable_install_builds_in_place_and_again_after_its_ninja_is_gone(tree: Path, nvcc: Path) -> None:
    (tree / "csrc" / "CMakeLists.txt").write_text(CMAKE_PROJECT)
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
    with pytest.raises(AssertionError, match="broken project"):
        build(tree, "build_editable", nvcc.parent)


@pytest.mark.parametrize("wanted", ["auto", "0", "1"])
def test_nothing_is_built_from_an_empty_csrc(
    setup_py: ModuleType, nvcc: Path, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    monkeypatch.setenv("PATH", str(nvcc.parent))
    monkeypatch.setenv("OVSEG_BUILD_CUDA", wanted)
    assert setup_py.native_compiler() == (None, "no native library to build, csrc holds no CMakeLists.txt")


@pytest.fixture
def decide(setup_py: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """The decision with a csrc to build and these environment variables."""
    (tree / "csrc" / "CMakeLists.txt").write_text(CMAKE_PROJECT)

    def decide(**environment: object) -> tuple[str | None, str]:
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        return setup_py.native_compiler()

    return decide


def test_nvcc_is_found_on_path_and_in_cuda_home(decide: Callable, nvcc: Path) -> None:
    built = (str(nvcc), f"native library built with {nvcc}")
    assert decide(CUDA_HOME=nvcc.parent.parent) == built
    assert decide(CUDA_HOME="", PATH=nvcc.parent) == built
    assert decide(PATH=nvcc.parent, OVSEG_BUILD_CUDA="1") == built


def test_without_nvcc_it_installs_without_the_library_and_says_so(decide: Callable) -> None:
    assert decide() == (None, "native library not built, no nvcc found")


def test_build_can_be_switched_off(decide: Callable, nvcc: Path) -> None:
    said = "native library not built, OVSEG_BUILD_CUDA=0"
    assert decide(PATH=nvcc.parent, OVSEG_BUILD_CUDA="0") == (None, said)


def test_forced_build_without_nvcc_is_an_error(decide: Callable) -> None:
    with pytest.raises(SystemExit, match="OVSEG_BUILD_CUDA=1, but nvcc is neither on PATH nor in CUDA_HOME"):
        decide(OVSEG_BUILD_CUDA="1")


def test_unknown_build_choice_is_an_error(decide: Callable) -> None:
    with pytest.raises(SystemExit, match="OVSEG_BUILD_CUDA is 'yes'; expected 0, 1 or auto"):
        decide(OVSEG_BUILD_CUDA="yes")
