"""Cost embedding of one 384 × 384 crop: the cost volume and its 7 × 7 convolution."""

from __future__ import annotations

from typing import Any

from operator_forms import compare, published_sizes

from samples import Sample


@published_sizes("cost_embedding")
def test_cost_embedding(benchmark: Any, row: Sample, form: str) -> None:
    compare(benchmark, row, form)
