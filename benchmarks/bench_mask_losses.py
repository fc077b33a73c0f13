"""Training losses of both methods at their published sizes, from low-resolution logits."""

from __future__ import annotations

from typing import Any

from operator_forms import compare, published_sizes

from samples import Sample


@published_sizes("mask_losses")
def test_mask_losses(benchmark: Any, row: Sample, form: str) -> None:
    compare(benchmark, row, form)
