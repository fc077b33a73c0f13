"""Layer gather of one 512 × 512 crop: seven blocks of CLIP ViT-B."""

from __future__ import annotations

from typing import Any

from operator_forms import compare, published_sizes

from samples import Sample


@published_sizes("layer_gather")
def test_layer_gather(benchmark: Any, row: Sample, form: str) -> None:
    compare(benchmark, row, form)
