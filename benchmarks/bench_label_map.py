"""Label map of both methods' sliding windows, from logits to labels."""

from __future__ import annotations

from typing import Any

from operator_forms import compare, published_sizes

from samples import Sample


@published_sizes("label_map")
def test_label_map(benchmark: Any, row: Sample, form: str) -> None:
    compare(benchmark, row, form)
