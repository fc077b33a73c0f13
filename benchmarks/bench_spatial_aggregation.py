"""Spatial aggregation of one 384 × 384 crop: a plain and a shifted window block."""

from __future__ import annotations

from typing import Any

from operator_forms import compare, published_sizes

from samples import Sample


@published_sizes("spatial_aggregation")
def test_spatial_aggregation(benchmark: Any, row: Sample, form: str) -> None:
    compare(benchmark, row, form)
