"""A training step of CAT-Seg ViT-B with 171 classes, batch 1, 384 × 384: this package against the literal form.

Each form runs once, in its own process: a step takes tens of seconds, the literal one minutes and 13 GB.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

CLASSES = 171


def measure(form: str) -> tuple[float, float]:
    """Seconds and peak megabytes above the weights of a step."""
    script = Path(__file__).with_name("training_forms.py")
    run = subprocess.run([sys.executable, script, form, str(CLASSES)], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, run.stdout.split())
    return seconds, megabytes


def test_training_step(benchmark: Any) -> None:
    """Less than 3 GB above the weights, and at least 3 times as fast as the literal form."""
    literal_seconds, literal_mb = measure("literal")
    seconds, megabytes = benchmark.pedantic(measure, args=("rewritten",), rounds=1)
    speedup = literal_seconds / seconds
    benchmark.extra_info.update(
        step_seconds=seconds,
        literal_step_seconds=literal_seconds,
        speedup=round(speedup, 2),
        rewritten_mb=megabytes,
        literal_mb=literal_mb,
    )
    assert megabytes < 3000
    assert speedup >= 3
