"""Launcher of `csrc/cpu/label_map.cpp`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native


def label_map(
    logits: Tensor, whole: Tensor | None, offset: Tensor | None, positions: Sequence[int], sizes: Sequence[int],
    k: int, need_scores: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(N, T, h, w) -> scores and labels of the best k classes (k, H, W), or with k = 0 the scores of all (T, H, W)."""
    scores = logits.new_empty((k or logits.shape[1], *sizes[4:]) if need_scores else 0)
    labels = logits.new_empty((k, *sizes[4:]), dtype=torch.int32)
    numbers = (ctypes.c_int64 * len(positions))(*positions)
    native.call(
        "ovseg_label_map_fwd", logits, whole, offset, numbers,
        scores if need_scores else None, labels if k else None, *logits.shape, *sizes, k, kind="cpu",
    )  # fmt: skip
    return scores, labels


def label_map_kept(
    logits: Tensor, whole: Tensor | None, offset: Tensor | None, slots: Tensor, dropped: float,
    positions: Sequence[int], sizes: Sequence[int], k: int, need_scores: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`label_map` of the classes of `slots`, from maps (N, K, h, w) of those that each window kept."""
    windows, maps, *size = logits.shape
    scores = logits.new_empty((k or slots.shape[1], *sizes[4:]) if need_scores else 0)
    labels = logits.new_empty((k, *sizes[4:]), dtype=torch.int32)
    numbers = (ctypes.c_int64 * len(positions))(*positions)
    native.call(
        "ovseg_label_map_kept_fwd", logits, whole, offset, numbers, slots,
        scores if need_scores else None, labels if k else None, windows, maps, slots.shape[1], *size, *sizes, k,
        dropped, kind="cpu",
    )  # fmt: skip
    return scores, labels
