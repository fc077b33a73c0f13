"""Mask attention of one 512 × 512 crop: the whole operator, and the scores that a last layer needs."""

from __future__ import annotations

from typing import Any

from operator_forms import compare, published_sizes

from samples import Sample


@published_sizes("mask_attention")
def test_mask_attention(benchmark: Any, row: Sample, form: str) -> None:
    compare(benchmark, row, form)


@published_sizes("mask_scores")
def test_mask_scores(benchmark: Any, row: Sample, form: str) -> None:
    compare(benchmark, row, form)
