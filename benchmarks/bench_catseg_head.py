"""The CAT-Seg-B head, one 384 × 384 crop, float32: the rewritten form against the literal one, side by side."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from head_forms import head_forms

from tolerances import REWRITE_FLOAT32, relative_error

ROUNDS = {20: 7, 171: 3}


@pytest.mark.parametrize("pooling", [2, 1])
@pytest.mark.parametrize("classes", [20, 171])
def test_head(benchmark, classes, pooling):
    """At least 2.5 times as fast, after the two agree; the forms take turns in one process."""
    forms = head_forms(classes, pooling)
    literal_times: list[float] = []

    def time_literal() -> None:
        start = time.perf_counter()
        forms["literal"]()
        literal_times.append(time.perf_counter() - start)

    with torch.inference_mode():
        error = relative_error(forms["rewritten"](), forms["literal"]())
        assert error <= REWRITE_FLOAT32
        benchmark.pedantic(forms["rewritten"], setup=time_literal, rounds=ROUNDS[classes], warmup_rounds=1)
    ratio = statistics.median(literal_times) / benchmark.stats["median"]
    benchmark.extra_info.update(
        literal_median=round(statistics.median(literal_times), 4),
        speedup=round(ratio, 2),
        relative_error=error,
        threads=torch.get_num_threads(),
    )
    assert ratio >= 2.5


@pytest.mark.parametrize("classes", [20, 171])
def test_head_memory(benchmark, classes):
    """Peak memory at most half, each form in a process of its own."""

    def peak(form: str) -> float:
        script = Path(__file__).with_name("head_forms.py")
        run = subprocess.run([sys.executable, script, form, str(classes)], capture_output=True, text=True, check=True)
        return float(run.stdout)

    literal = peak("literal")
    rewritten = benchmark.pedantic(peak, args=("rewritten",), rounds=1)
    benchmark.extra_info.update(literal_mb=literal, rewritten_mb=rewritten)
    assert rewritten <= literal / 2
