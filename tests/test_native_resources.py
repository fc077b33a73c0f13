"""Every CUDA C++ kernel as it was compiled: nothing spills, tensor cores work in every format, and registers and shared
memory are those that were recorded.

A change is no error in itself: look at it, then record it with `python tests/native_resources.py --write`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import native_resources
from native_resources import Table

CSRC = native_resources.ROOT / "csrc"
SHARED_LIMIT = 48 * 1024  # that a kernel may declare
# Number format of a kernel -> the instruction of its products.
PRODUCTS = {"float": "HMMA.1688.F32.TF32", "half": "HMMA.16816.F32", "bfloat16": "HMMA.16816.F32.BF16"}


@pytest.fixture(scope="module")
def library(built_library: Path) -> Path:
    if native_resources.disassembler() is None or native_resources.name_reader() is None:
        pytest.skip("this takes cuobjdump, of CUDA or of triton, and c++filt")
    return built_library


@pytest.fixture(scope="module")
def measured(library: Path) -> Table:
    return native_resources.resources(library)


def of_format(kernel: str) -> tuple[str, str]:
    """A kernel's name without its number format, and that format."""
    names = re.findall(r"\b(?:bfloat16|half|float)\b", kernel)
    return re.sub(r"\b(?:bfloat16|half|float)\b", "T", kernel), names[0] if names else ""


def test_every_file_has_kernels_and_every_kernel_all_architectures(measured: Table) -> None:
    assert {kernel.partition(":")[0] for kernel in measured} == {path.name for path in CSRC.glob("*.cu")}
    architectures = {frozenset(row) for row in measured.values()}
    assert len(architectures) == 1, "a kernel is not compiled for all"


def test_no_kernel_spills_registers(measured: Table) -> None:
    spilled = [(kernel, name) for kernel, row in measured.items() for name, usage in row.items() if usage["stack"]]
    assert spilled == []


def test_kernels_use_what_is_recorded(measured: Table, library: Path) -> None:
    record = json.loads(native_resources.RECORD.read_text())
    assert set(record["kernels"]) == set(measured)
    for kernel, row in measured.items():
        assert all(usage["shared"] <= SHARED_LIMIT and usage["registers"] <= 255 for usage in row.values()), kernel
    version = native_resources.compiler_version(library)
    if version != record["nvcc"]:
        pytest.skip(f"the record is of nvcc {record['nvcc']}; {version} uses other registers")
    for kernel, row in measured.items():  # of the architectures that were built
        recorded = record["kernels"][kernel]
        assert row == {name: recorded[name] for name in row if name in recorded}, kernel


def uses_tensor_cores(path: Path) -> bool:
    """Whether a source file includes mma.cuh, through other headers too."""
    headers = re.findall(r'#include "([^"]+)"', path.read_text())
    return any(Path(header).name == "mma.cuh" or uses_tensor_cores(path.parent / header) for header in headers)


@pytest.mark.slow
def test_products_run_on_tensor_cores_and_nothing_goes_through_local_memory(library: Path) -> None:
    """In the machine code: kernels of a name work alike in every number format and on every architecture."""
    found = native_resources.instructions(library)
    for kernel, row in found.items():
        for architecture, counts in row.items():
            assert not [name for name in counts if name.startswith(("STL", "LDL"))], (kernel, architecture)
    with_products = {of_format(kernel)[0] for kernel, row in found.items() if any(row.values())}  # nothing else is left
    assert {name.partition(":")[0] for name in with_products} == {
        path.name for path in CSRC.glob("*.cu") if uses_tensor_cores(path)
    }
    for kernel, row in found.items():
        name, number = of_format(kernel)
        if name in with_products:
            for architecture, counts in row.items():
                assert set(counts) == {PRODUCTS[number]}, (kernel, architecture)


@pytest.mark.skipif(native_resources.name_reader() is None, reason="there is no c++filt")
def test_kernel_names_are_readable() -> None:
    unit = "_ZN5ovseg55_GLOBAL__N__275204c4_22_spatial_aggregation_cu_af9e000c"
    names = {
        f"{unit}19spatial_aggregationI13__nv_bfloat16EEvNS0_9ArgumentsIT_EE": (
            "spatial_aggregation.cu: spatial_aggregation<bfloat16>"
        ),
        f"{unit}4foldIfLi128ELb1EEEvPKT_": "spatial_aggregation.cu: fold<float, 128, true>",
        "_Z5plainPf": "plain",
    }
    assert native_resources.readable(list(names)) == names
