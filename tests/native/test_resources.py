"""Every CUDA C++ kernel as it was compiled: nothing spills, tensor cores work in every format, and registers and shared
memory leave room for as many warps as the kernel is designed for.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from native import resources
from native.resources import Table

CSRC = resources.ROOT / "csrc"
REGISTERS = 64 * 1024  # of a multiprocessor
# Kilobytes of shared memory that a block may have: CUDA C++ Programming Guide, "Technical Specifications".
SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227, "sm_100": 227, "sm_120": 99}
# Number format of a kernel -> the instruction of its products.
PRODUCTS = {"float": "HMMA.1688.F32.TF32", "half": "HMMA.16816.F32", "bfloat16": "HMMA.16816.F32.BF16"}

# Kernel -> warps that a multiprocessor runs at once if only registers count: those of a block times the blocks that the
# kernel is designed for, its __launch_bounds__ where these name blocks. Two numbers: 16-bit numbers, float32.
WARPS: dict[str, int | tuple[int, int]] = {
    "add_partial_sums": 64,
    "aggregate": 48,
    "aggregate_backward": 16,
    "class_aggregation": (12, 4),
    "class_attention_backward": (12, 8),
    "combine_gradients": 24,
    "combine_moments": 24,
    "cost_gradient": 16,
    "cost_volume": 24,
    "differentiate": 24,
    "embed": 16,
    "embed_one_prompt": 16,
    "layer_gather": 8,
    "length_backward": 48,
    "normalise_groups": 24,
    "normalise_patches": 32,
    "norms_backward": 24,
    "residual_mlp_backward": (8, 4),
    "resize_add": 32,
    "resize_backward": 32,
    "score_map": 24,
    "spatial_aggregation": 12,
    "spatial_attention_backward": 9,
    "sum_gradients": 16,
    "sum_norm_gradients": 40,
    "sum_parts": 48,
    "take_moments": 24,
    "through_norm": 40,
    "top_labels": 16,
    "weight_gradient": 16,
}


@pytest.fixture(scope="module")
def library(built_library: Path) -> Path:
    if resources.disassembler() is None or resources.name_reader() is None:
        pytest.skip("this takes cuobjdump, of CUDA or of triton, and c++filt")
    return built_library


@pytest.fixture(scope="module")
def measured(library: Path) -> Table:
    return resources.resources(library)


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


def name_of(kernel: str) -> str:
    return kernel.partition(": ")[2].partition("<")[0]


def test_every_kernel_says_how_many_warps_it_is_designed_for(measured: Table) -> None:
    assert {name_of(kernel) for kernel in measured} == set(WARPS)


def test_registers_leave_room_for_the_warps_that_a_kernel_is_designed_for(measured: Table) -> None:
    """Registers are allotted to a warp eight a thread at a time."""
    for kernel, row in measured.items():
        warps = WARPS[name_of(kernel)]
        if isinstance(warps, tuple):
            warps = warps["<float" in kernel]
        for architecture, usage in row.items():
            registers = -(-usage["registers"] // 8) * 8
            assert registers * 32 * warps <= REGISTERS, (kernel, architecture, usage)


def test_kernels_declare_no_more_shared_memory_than_a_block_may_have(measured: Table) -> None:
    """What launches ask for beside it is in test_functions.py."""
    for kernel, row in measured.items():
        for architecture, usage in row.items():
            assert usage["shared"] <= min(SHARED[architecture], 48) * 1024, (kernel, architecture)


def test_kernels_of_different_files_have_different_names() -> None:
    """A profile tells them apart by name alone."""
    defined = re.compile(r"__global__\s+void\s+__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*(\w+)\(")
    sources = [*CSRC.glob("*.cu"), *CSRC.glob("device/*")]
    names = [name for path in sources for name in defined.findall(path.read_text())]
    assert len(names) == sum(path.read_text().count("__global__") for path in sources)
    assert sorted(names) == sorted(WARPS)


def uses_tensor_cores(path: Path) -> bool:
    """Whether a source file includes mma.cuh, through other headers too."""
    headers = re.findall(r'#include "([^"]+)"', path.read_text())
    return any(Path(header).name == "mma.cuh" or uses_tensor_cores(path.parent / header) for header in headers)


@pytest.mark.slow
def test_products_run_on_tensor_cores_and_nothing_goes_through_local_memory(library: Path) -> None:
    """In the machine code: kernels of a name work alike in every number format and on every architecture."""
    found = resources.instructions(library)
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


@pytest.mark.skipif(resources.name_reader() is None, reason="there is no c++filt")
def test_kernel_names_are_readable() -> None:
    unit = "_ZN5ovseg55_GLOBAL__N__275204c4_22_spatial_aggregation_cu_af9e000c"
    names = {
        f"{unit}19spatial_aggregationI13__nv_bfloat16EEvNS0_9ArgumentsIT_EE": (
            "spatial_aggregation.cu: spatial_aggregation<bfloat16>"
        ),
        f"{unit}4foldIfLi128ELb1EEEvPKT_": "spatial_aggregation.cu: fold<float, 128, true>",
        "_Z5plainPf": "plain",
    }
    assert resources.readable(list(names)) == names
