"""Cost volume of one 384 × 384 crop: cosines of 24 × 24 patches with every class."""

from __future__ import annotations

from typing import Any

from operator_forms import compare, published_sizes

from samples import Sample


@published_sizes("cost_volume")
def test_cost_volume(benchmark: Any, row: Sample, form: str) -> None:
    compare(benchmark, row, form)
