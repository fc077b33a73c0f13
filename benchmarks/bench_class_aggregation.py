"""Class aggregation of one 384 × 384 crop, with and without pooling."""

from __future__ import annotations

from typing import Any

from operator_forms import compare, published_sizes

from samples import Sample


@published_sizes("class_aggregation")
def test_class_aggregation(benchmark: Any, row: Sample, form: str) -> None:
    compare(benchmark, row, form)
