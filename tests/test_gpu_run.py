"""`make gpu` without a GPU: the script is tried on small rows in Triton's interpreter, so that it works with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from work import OPERATIONS, work

from ovseg_fast import ops
from samples import select

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu") / "interpreter.json"
    run = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", "--smoke", "--skip-tests", "--only", "cost_", "--out", out],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OVSEG_BACKEND": "auto"},
    )
    assert run.returncode == 0, run.stderr
    return out


def test_a_run_checks_and_times_every_form(results: Path) -> None:
    measured = json.loads(results.read_text())
    assert measured["machine"]["gpu"] == "interpreter"
    entry = measured["operators"]["cost_volume-small bfloat16"]
    assert entry["triton"]["backend"] == "triton" and entry["eager"]["backend"] == "torch"
    for form in ("triton", "eager"):
        for kind in ("forward", "with_backward"):
            assert entry[form][kind]["us"] > 0
            assert entry[form][kind]["bytes"] > 0 < entry[form][kind]["flops"]


def test_a_run_is_plotted(results: Path) -> None:
    assert all(results.with_name(f"interpreter-{kind}.png").stat().st_size for kind in ("forward", "with_backward"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    run = subprocess.run([sys.executable, BENCHMARKS / "gpu.py"], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.strip() == "Error: PyTorch finds no GPU here; --smoke tries the script without one."


def test_every_published_size_has_a_prediction() -> None:
    predictions = json.loads((BENCHMARKS / "predictions.json").read_text())["operators"]
    assert set(predictions) == {row.id for row in select("bench")}
    for row in select("bench"):
        predicted = predictions[row.id]
        assert predicted["forward_us"] > 0 and predicted["why"]
        assert (predicted["backward_us"] is None) == (row.operator == "label_map")


def test_work_is_known_for_every_operator_and_counts_the_products(rng: torch.Generator) -> None:
    library_only = {"embed_volume", "guidance_term"}
    assert set(OPERATIONS) >= {name for name in ops.__all__ if name.islower()} - library_only
    row = next(row for row in select("bench", function="cost_volume") if "171" in row.name)
    call = row.build(rng)
    moved, operations = work(row, call, row.run(call))
    assert operations == 2 * 171 * 24 * 24 * 512
    assert moved == 4 * (24 * 24 * 512 + 171 * 512 + 171 * 24 * 24)
