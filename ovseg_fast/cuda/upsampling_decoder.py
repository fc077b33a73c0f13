"""Launchers of `csrc/upsampling_decoder.cu` and `csrc/upsampling_decoder_backward.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native

CHUNK = 8192  # numbers of a map whose sums one block takes: 16 to 32 KB on their way to it
TILE_BYTES = 4096  # of a map, which the last backward kernel's blocks take, 16 bytes a thread
BLOCKS = 1024  # of that kernel, about: fewer do not fill a GPU, more leave more parts of dterm


def guided_group_norm(
    y: Tensor, term: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """(B, T, H, W, D) and (B, H, W, D) -> the normalised (B, T, H, W, D), and mean and 1 / s of each group, (B, T,
    groups, 2) in float32."""
    y, weight, bias = native.aligned(y), native.aligned(weight), native.aligned(bias)
    term = None if term is None else native.aligned(term)
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
    grad: Tensor, y: Tensor, term: Tensor | None, statistics: Tensor, weight: Tensor, bias: Tensor,
    need_y: bool, need_term: bool, need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of y, term, weight and bias; an empty tensor where none is needed."""
    grad, y, statistics, weight, bias = (native.aligned(tensor) for tensor in (grad, y, statistics, weight, bias))
    term = None if term is None else native.aligned(term)
    batch, classes, height, width, channels = y.shape
    groups = statistics.shape[2]
    chunk, chunks = _chunk(y)
    # Blocks of several classes share what is the same for all of them.
    tiles = -(-height * width * channels * y.element_size() // TILE_BYTES)
    each = -(-classes // max(BLOCKS // max(batch * tiles, 1), 1))
    splits = -(-classes // each)
    y_grad = torch.empty_like(y) if need_y else None
    parts = y.new_empty(batch, splits, height, width, channels, dtype=torch.float32) if need_term else None
    sums = y.new_empty(batch * classes, chunks, 2, channels, dtype=torch.float32)
    native.call(
        "ovseg_upsampling_decoder_norm_bwd", grad, y, term, statistics, weight, bias, y_grad, parts, sums,
        torch.empty_like(statistics), batch, classes, height * width, channels, groups, chunk, splits,
    )  # fmt: skip
    empty = y.new_empty(0)
    bias_grad = weight_grad = empty
    if need_affine:
        bias_grad, weight_grad = sums.sum((0, 1)).to(y.dtype).unbind()
        weight_grad = weight_grad.clone()
    return (
        empty if y_grad is None else y_grad,
        empty if parts is None else parts.sum(1).to(y.dtype),
        weight_grad,
        bias_grad,
    )


def _chunk(y: Tensor) -> tuple[int, int]:
    """Positions whose sums one block takes, and how many such chunks a map has."""
    positions, channels = y.shape[2] * y.shape[3], y.shape[4]
    chunk = max(min(CHUNK // channels, positions), 1)
    return chunk, -(-positions // chunk)
