"""Launchers of `csrc/label_map.cu`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native


def top_labels(
    logits: Tensor, whole: Tensor | None, offset: Tensor | None, positions: Sequence[int],
    window: Sequence[int], canvas: Sequence[int], size: Sequence[int], k: int, need_scores: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(N, T, h, w) -> the best k scores of each pixel (k, H, W), empty where not needed, and their classes, int32."""
    labels = logits.new_empty((k, *size), dtype=torch.int32)
    scores = torch.empty_like(labels, dtype=logits.dtype) if need_scores else None
    _launch(logits, whole, offset, positions, window, canvas, size, scores, labels, k)
    return logits.new_empty(0) if scores is None else scores, labels


def score_map(
    logits: Tensor, whole: Tensor | None, offset: Tensor | None, positions: Sequence[int],
    window: Sequence[int], canvas: Sequence[int], size: Sequence[int],
) -> Tensor:  # fmt: skip
    """(N, T, h, w) -> scores (T, H, W)."""
    scores = logits.new_empty(logits.shape[1], *size)
    _launch(logits, whole, offset, positions, window, canvas, size, scores, None, 0)
    return scores


def _launch(
    logits: Tensor, whole: Tensor | None, offset: Tensor | None, positions: Sequence[int],
    window: Sequence[int], canvas: Sequence[int], size: Sequence[int],
    scores: Tensor | None, labels: Tensor | None, k: int,
) -> None:  # fmt: skip
    """`positions` holds (top, left) of each window, one after the other; with k = 0 all scores are wanted."""
    optional = [None if tensor is None else native.aligned(tensor) for tensor in (whole, offset)]
    # The launch itself carries the positions: nothing is copied from the host, and a CUDA graph holds them.
    numbers = (ctypes.c_int64 * len(positions))(*positions)
    native.call(
        "ovseg_label_map_fwd", native.aligned(logits), *optional, ctypes.addressof(numbers), scores, labels,
        *logits.shape, *window, *canvas, *size, k,
    )  # fmt: skip
