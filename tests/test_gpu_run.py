"""`make gpu` without a GPU: the script is tried on small rows in Triton's interpreter, so that it works with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import gpu
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from work import OPERATIONS, PREDICTIONS, floor_us, prediction, work

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what the interpreter needs, without a GPU")
def test_kernels_that_cannot_run_are_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reason = "the interpreter of triton 3.6.0 needs a numpy older than 2.4, this is 2.4.6"
    monkeypatch.setattr(gpu.backends, "interpreter_refusal", lambda: reason)
    with pytest.raises(click.ClickException, match=f"^Triton's kernels cannot run here: {reason}.$"):
        gpu.main.main(["--smoke", "--out", str(tmp_path / "results.json")], standalone_mode=False)
    assert not list(tmp_path.iterdir())


def test_every_operator_has_one_prediction_above_its_floor() -> None:
    rows = {row.function: row for row in select("bench") if prediction(row)}
    on_gpus = {row.operator for row in select("bench")} - {"encoder_block"}  # which has no kernels for GPUs
    assert set(PREDICTIONS["operators"]) == set(rows) == on_gpus
    for operator, expected in PREDICTIONS["operators"].items():
        with FakeTensorMode():
            call = rows[operator].build(torch.Generator(), torch.bfloat16)
        floors = [  # without the results' bytes
            floor_us(*work(rows[operator], call, (), backward), PREDICTIONS["ceilings"]) for backward in (False, True)
        ]
        assert expected["triton"] and expected["why"]
        assert (expected["triton"][1] is None) == (operator == "label_map")
        for forward, backward in filter(None, (expected["triton"], expected["cuda"])):
            assert forward >= floors[0]
            assert backward is None or forward + backward >= floors[1]


def test_work_is_known_for_every_operator_and_counts_the_products(rng: torch.Generator) -> None:
    library_only = {"embed_volume", "guidance_term"}
    assert set(OPERATIONS) >= {name for name in ops.__all__ if name.islower()} - library_only
    row = next(row for row in select("bench", function="cost_volume") if "171" in row.name)
    call = row.build(rng)
    moved, operations = work(row, call, row.run(call))
    assert operations == 2 * 171 * 24 * 24 * 512
    assert moved == 4 * (24 * 24 * 512 + 171 * 512 + 171 * 24 * 24)
