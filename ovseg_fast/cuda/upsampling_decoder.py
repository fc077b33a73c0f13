"""Launchers of `csrc/upsampling_decoder.cu` and `csrc/upsampling_decoder_backward.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native

CHUNK = 8192  # numbers of a map that one block sums: 16 to 32 KB in flight
TILE_BYTES = 4096  # of a map, that a block of the last backward kernel takes, 16 bytes a thread
BLOCKS = 1024  # of that kernel, about: fewer do not fill a GPU, more leave more partial sums of dterm


def guided_group_norm(
    y: Tensor, term: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """(B, T, H, W, D) and (B, H, W, D) -> out (B, T, H, W, D), and mean and 1 / s of each group, (B, T, groups, 2)."""
    batch, classes, height, width, channels = y.shape
    chunk, chunks = _chunk(y)
    out = torch.empty_like(y)
    statistics = y.new_empty(batch, classes, groups, 2, dtype=torch.float32)
    moments = y.new_empty(batch * classes, chunks, 2, channels, dtype=torch.float32)
    native.call(
        "ovseg_upsampling_decoder_norm_fwd", y, term, weight, bias, out, statistics, moments,
        batch, classes, height * width, channels, groups, chunk, eps,
    )  # fmt: skip
    return out, statistics


def guided_group_norm_backward(
    grad: Tensor, statistics: Tensor, y: Tensor, term: Tensor | None, weight: Tensor, bias: Tensor,
    groups: int, eps: float, needs: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of y, term, weight and bias."""
    batch, classes, height, width, channels = y.shape
    chunk, chunks = _chunk(y)
    # Blocks of several classes share what is the same for all of them.
    tiles = -(-height * width * channels * y.element_size() // TILE_BYTES)
    classes_each = -(-classes // max(BLOCKS // max(batch * tiles, 1), 1))
    splits = -(-classes // classes_each)
    y_grad = torch.empty_like(y) if needs[0] else None
    parts = y.new_empty(batch, splits, height, width, channels, dtype=torch.float32) if needs[1] else None
    sums = y.new_empty(batch * classes, chunks, 2, channels, dtype=torch.float32)
    native.call(
        "ovseg_upsampling_decoder_norm_bwd", grad, y, term, statistics, weight, bias, y_grad, parts, sums,
        torch.empty_like(statistics), batch, classes, height * width, channels, groups, chunk, splits,
    )  # fmt: skip
    term_grad = None if parts is None else parts.sum(1).to(y.dtype)
    bias_grad, weight_grad = (part.sum((0, 1)).to(y.dtype) for part in sums.unbind(2))
    return [y_grad, term_grad, weight_grad, bias_grad]


def _chunk(y: Tensor) -> tuple[int, int]:
    """Positions whose sums one block takes, and how many such chunks a map has."""
    positions, channels = y.shape[2] * y.shape[3], y.shape[4]
    chunk = max(min(CHUNK // channels, positions), 1)
    return chunk, -(-positions // chunk)
