"""Upsampling decoder of one 384 × 384 crop: either stage, the guidance's share included."""

from __future__ import annotations

from typing import Any

from operator_forms import compare, published_sizes

from samples import Sample


@published_sizes("upsampling_decoder")
def test_upsampling_decoder(benchmark: Any, row: Sample, form: str) -> None:
    compare(benchmark, row, form)
