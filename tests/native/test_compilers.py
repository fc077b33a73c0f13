"""The CPU kernels by other compilers than this installation's: GCC for AArch64, whose code an emulator runs, and clang.

On Debian and Ubuntu they are the packages g++-aarch64-linux-gnu, qemu-user-static and clang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import test_kernels
from native import aarch64, emulated
from native.header import CPU_ABOUT_ITSELF
from native.test_cpu_library import apart
from native.test_library import tool
from ovseg_fast import backends, native
from test_kernels import CPU_FUNCTIONS, check_cpu_rows, differentiable


@pytest.fixture(scope="session")
def aarch64_library() -> Path:
    return emulated.build_cpu_by(emulated.AARCH64_COMPILER, "cpu-aarch64", *emulated.AARCH64_SYSTEM)


@pytest.fixture(scope="session")
def caller(aarch64_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return aarch64.build_caller(tmp_path_factory.mktemp("aarch64"))


@pytest.fixture
def machine(
    cpu_library: Path, aarch64_library: Path, caller: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[aarch64.Machine]:
    """The CPU kernels run on an emulated AArch64 machine; whether they take a call, this machine's library says."""
    with aarch64.machine(caller, aarch64_library) as machine:
        monkeypatch.setattr(native, "call", machine.call)
        yield machine


def test_aarch64_library_is_compiled_without_a_warning(aarch64_library: Path) -> None:
    """And exports the same functions, and shares no code between instruction sets."""
    assert "AArch64" in tool("readelf", "--file-header", aarch64_library)
    symbols = tool("nm", "--dynamic", "--defined-only", aarch64_library)
    assert {line.split()[-1] for line in symbols.splitlines()} == {*CPU_ABOUT_ITSELF, *native.CPU_FUNCTIONS}
    assert apart(aarch64_library.parent)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", backends.CPU_DTYPES, ids=str)
@pytest.mark.parametrize("function", CPU_FUNCTIONS)
def test_aarch64_follows_float64(
    machine: aarch64.Machine, function: str, dtype: torch.dtype, rng: torch.Generator
) -> None:
    check_cpu_rows(function, dtype, rng)
    assert machine.called


@pytest.mark.parametrize("function", [function for function in CPU_FUNCTIONS if differentiable(function)])
def test_aarch64_lets_nan_and_infinity_through(machine: aarch64.Machine, function: str, rng: torch.Generator) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        test_kernels.test_nan_and_infinity_come_out_where_pytorch_has_them("cpu", function, value, rng)
    assert machine.called


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
def test_clang_follows_float64_without_a_warning(
    cpu_library: Path, use_library: Callable[..., None], rng: torch.Generator
) -> None:
    """On every instruction set of this machine."""
    library = emulated.build_cpu_by("clang++", "cpu-clang")
    assert apart(library.parent)
    use_library(library, "cpu")
    for isa in native.ISAS:
        if native.library("cpu").ovseg_cpu_choose(isa.encode()) == 0:
            check_every_function(rng)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
def test_clang_for_aarch64_follows_float64_without_a_warning(
    cpu_library: Path, caller: Path, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    target = f"-DCMAKE_CXX_COMPILER_TARGET={emulated.AARCH64}"
    library = emulated.build_cpu_by("clang++", "cpu-aarch64-clang", target, *emulated.AARCH64_SYSTEM)
    assert apart(library.parent)
    with aarch64.machine(caller, library) as machine:
        monkeypatch.setattr(native, "call", machine.call)
        check_every_function(rng)
        assert machine.called == set(native.CPU_FUNCTIONS)


def check_every_function(rng: torch.Generator) -> None:
    for function in CPU_FUNCTIONS:
        for dtype in backends.CPU_DTYPES:
            check_cpu_rows(function, dtype, rng)
