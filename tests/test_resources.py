"""Every Triton kernel compiled ahead of time for three GPU generations: nothing spills, shared memory fits, and
registers leave room for as many warps as the kernel is designed for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from ovseg_fast import backends
from ovseg_fast.kernels.common import launch

TESTS = Path(__file__).parent
REGISTERS = 65536  # of a multiprocessor
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # bytes of a multiprocessor
SHARED_PROGRAM = 99 * 1024  # bytes that a program may have on a consumer card
MEASURED_WITH = "3.7.1"  # the triton of constraints.txt
RESERVED = 1024  # bytes of shared memory that the system takes of each program

# Warps that a multiprocessor holds at a time: 8, and more for kernels that hide the latency of memory by them.
WARPS = {
    "class_aggregation_resize.resize_add": 16,
    "class_aggregation_resize.resize_backward": 16,
    "class_aggregation_tokens.normalise": 20,
    "class_aggregation_tokens.normalise_backward": 12,
    "cost_volume.forward": 16,
    "gaussian_aggregation.backward": 32,
    "gaussian_aggregation.forward": 32,
    "layer_gather_backward.norms_backward": 12,
    "mask_attention.scores": 16,
    "mask_losses.add": 32,
    "mask_losses.forward": 16,
    "spatial_aggregation_backward.norm_backward": 12,
    "upsampling_decoder.backward": 12,
    "upsampling_decoder.backward_means": 16,
    "upsampling_decoder.backward_sums": 16,
    "upsampling_decoder.forward": 20,
    "upsampling_decoder.moments": 28,
    "upsampling_decoder.statistics": 24,
}

# The kernels that spill, and how many bytes of a thread at most: a few registers, for which the compiler keeps an
# occupancy step.
SPILLS = {
    "class_aggregation.linear fp32": 8,
    "class_aggregation_softmax.keys fp32": 8,
    "class_aggregation_softmax.queries bf16": 24,
    "class_aggregation_softmax.queries fp32": 8,
    "cost_embedding.forward bf16": 24,
    "cost_embedding.forward fp32": 24,
    "cost_volume.backward bf16": 8,
    "cost_volume.forward bf16": 8,
    "label_map.forward bf16": 8,
    "mask_attention.backward bf16": 48,
    "mask_attention.backward fp32": 16,
    "residual_mlp.mlp_backward bf16": 16,
    "spatial_aggregation_backward.attend_backward fp32": 8,
}


def bound(usage: dict[str, Any]) -> tuple[int, int, int]:
    """The most registers, bytes of shared memory and spilled bytes that a kernel may use."""
    warps = WARPS.get(usage["kernel"].partition(" ")[0], 8)
    programs = max(1, warps // usage["warps"])
    registers = min(255, REGISTERS // (32 * usage["warps"] * programs) // 8 * 8)  # given out by eights
    shared = min(SHARED_PROGRAM, SHARED[usage["architecture"]] // programs - RESERVED)
    return registers, shared, SPILLS.get(usage["kernel"], 0)


@pytest.mark.parametrize("operator", backends.operators_with_kernels())
def test_kernels_compile_within_bounds(operator: str) -> None:
    script = "import json, resources, sys; print(json.dumps([u._asdict() for u in resources.usages(sys.argv[1])]))"
    run = subprocess.run(
        [sys.executable, "-c", script, operator],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    usages = json.loads(run.stdout.splitlines()[-1])
    assert {usage["architecture"] for usage in usages} == set(SHARED)
    over = []
    for usage in usages:
        limits = bound(usage)
        used = usage["registers"], usage["shared"], usage["spilled"]
        assert usage["shared"] <= limits[1], usage
        if any(value > limit for value, limit in zip(used, limits, strict=True)):
            over.append(f"{usage['kernel']} on sm_{usage['architecture']}: {used} of {limits}")
    if metadata.version("triton") != MEASURED_WITH:
        pytest.skip(f"all compile; the other bounds are of triton {MEASURED_WITH}, another compiler differs")
    assert over == []


@pytest.mark.parametrize("kernel", sorted({name.partition(" ")[0] for name in (*WARPS, *SPILLS)}))
def test_bounds_are_of_kernels_that_exist(kernel: str) -> None:
    module, _, name = kernel.partition(".")
    package = "ovseg_fast.kernels.common" if module == "residual_mlp" else "ovseg_fast.kernels"
    found = import_module(f"{package}.{module}")
    assert hasattr(found, name) or hasattr(found, f"_{name}")


def test_a_generation_may_have_block_sizes_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {2: "common", (2, 80): "of sm_80", 4: "float32"}
    low, wide = torch.empty(1, dtype=torch.bfloat16), torch.empty(1)
    assert launch.sizes(table, low) == "common"  # the interpreter
    monkeypatch.setattr(launch, "recorder", print)
    found = {}
    for generation in (80, 90, 100):
        monkeypatch.setattr(launch, "recorded_generation", generation)
        found[generation] = launch.sizes(table, low)
        assert launch.sizes(table, wide) == "float32"
    assert found == {80: "of sm_80", 90: "common", 100: "common"}


@pytest.mark.parametrize(
    ("capability", "generation"),
    [((8, 0), 80), ((8, 6), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((12, 0), 80)],
)
def test_gpus_belong_to_a_generation(
    capability: tuple[int, int], generation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert launch.generation.__wrapped__(0) == generation
