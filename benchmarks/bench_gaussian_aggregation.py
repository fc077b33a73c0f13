"""Gaussian aggregation of one 512 × 512 crop: one stage of three layers."""

from __future__ import annotations

from typing import Any

from operator_forms import compare, published_sizes

from samples import Sample


@published_sizes("gaussian_aggregation")
def test_gaussian_aggregation(benchmark: Any, row: Sample, form: str) -> None:
    compare(benchmark, row, form)
