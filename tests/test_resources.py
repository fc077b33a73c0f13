"""Every Triton kernel compiled ahead of time for three GPU generations, against the recorded use of registers, shared
memory and spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from ovseg_fast import backends
from ovseg_fast.kernels.common import launch

TESTS = Path(__file__).parent
SHARED_LIMIT = 99 * 1024  # of a consumer card
RECORDED_WITH = "3.7.1"  # the triton of constraints.txt


@pytest.mark.parametrize("operator", backends.operators_with_kernels())
def test_kernels_compile_and_use_what_is_recorded(operator: str) -> None:
    """A change is no error in itself: look at it, then record it with `python tests/resources.py --write OPERATOR`."""
    script = "import json, resources, sys; print(json.dumps(resources.table(sys.argv[1])))"
    run = subprocess.run(
        [sys.executable, "-c", script, operator],
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    measured = json.loads(run.stdout.splitlines()[-1])
    assert measured
    for label, row in measured.items():
        for architecture, usage in row.items():
            assert usage["shared"] <= SHARED_LIMIT, (label, architecture)
    if metadata.version("triton") != RECORDED_WITH:
        pytest.skip(f"all compile; the record is of triton {RECORDED_WITH}, another compiler uses other registers")
    assert measured == json.loads((TESTS / "resources" / f"{operator}.json").read_text())


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
