"""The CAT-Seg-B head, one 384 × 384 crop, float32: the rewritten form against the literal one, side by side."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from head_forms import head_forms
from side_by_side import speedup

ROUNDS = {20: 7, 171: 3}


@pytest.mark.parametrize("pooling", [2, 1])
@pytest.mark.parametrize("classes", [20, 171])
def test_head(benchmark: Any, classes: int, pooling: int) -> None:
    """At least 2.5 times as fast, with class pooling as in training (2) and in the published evaluation (1)."""
    forms = head_forms(classes, pooling)
    assert speedup(benchmark, forms["literal"], forms["rewritten"], ROUNDS[classes]) >= 2.5


@pytest.mark.parametrize("classes", [20, 171])
def test_head_memory(benchmark: Any, classes: int) -> None:
    """Peak memory at most half, each form in its own process."""

    def peak(form: str) -> float:
        script = Path(__file__).with_name("head_forms.py")
        run = subprocess.run([sys.executable, script, form, str(classes)], capture_output=True, text=True, check=True)
        return float(run.stdout)

    literal = peak("literal")
    rewritten = benchmark.pedantic(peak, args=("rewritten",), rounds=1)
    benchmark.extra_info.update(literal_mb=literal, rewritten_mb=rewritten)
    assert rewritten <= literal / 2
