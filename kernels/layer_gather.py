"""Layer gather, of single layers or summed over the layers of a stage.

    x̂ = norm(h_l[patch]),  u = a · x̂ + c         LN_shared, which all layers share
    û = norm(u),           y = g_l · û + b_l     LN_l
    z = y · P_l,           f_l = z / n,          n = max(‖z‖, ε)

with norm(x) = (x − mean(x)) / √(var(x) + eps). Stored are the layers' maps f_l, or only Σ_l w_l · f_l.

u − mean(u) is affine in x: a program reads its rows first for the four numbers of both norms, then normalises a few
channels at a time, as they enter the product with P_l.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import cdiv, launch, precision
from .layer_gather_backward import norms_backward, projection_backward
from .layer_gather_tokens import LAYERS, of_layer, padded, project, tiles

__all__ = ["layer_gather", "norms_backward", "projection_backward"]


@triton.jit
def _gather(
    h0, h1, h2, h3, h4, h5, h6, h7, shared_weight, shared_bias, norm_weight, norm_bias, projection, weights, maps,
    rows, patches, first_patch, batch_stride, token_stride, channels, width, shared_eps, norm_eps,
    SUMMED: tl.constexpr, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of rows of the weighted sum over SUMMED neighbouring layers."""
    row_tiles = tl.cdiv(rows, ROWS)
    group = tl.program_id(0) // row_tiles
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)[:, None]
    offset = (row // patches).to(tl.int64) * batch_stride + (first_patch + row % patches).to(tl.int64) * token_stride
    col = tl.arange(0, WIDTH)[None, :]
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in range(SUMMED):
        layer = group * SUMMED + i
        z, length = project(
            of_layer(layer, h0, h1, h2, h3, h4, h5, h6, h7) + offset, row < rows, shared_weight, shared_bias,
            norm_weight + layer * channels, norm_bias + layer * channels, projection + layer * channels * width, maps,
            channels, width, shared_eps, norm_eps, ROWS, WIDTH, CHANNELS, WIDE, PRECISION, False,
        )  # fmt: skip
        f = z / length
        if WEIGHTED:
            f *= tl.load(weights + layer).to(tl.float32)
        acc += f
    out = maps + (group.to(tl.int64) * rows + row) * width + col
    tl.store(out, acc, mask=(row < rows) & (col < width))


def layer_gather(
    hidden: Sequence[Tensor], patches: int, shared_weight: Tensor, shared_bias: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, projection: Tensor, weights: Tensor | None, shared_eps: float, norm_eps: float,
) -> Tensor:  # fmt: skip
    """L tensors (B, N, D), (D,) twice, (L, D) twice and (L, D, E) -> (L, B, S, E), or with weights (L,) (B, S, E)."""
    batch, tokens, channels = hidden[0].shape
    layers, rows, width = len(hidden), batch * patches, projection.shape[-1]
    summed = 1 if weights is None else min(layers, LAYERS)
    groups = cdiv(layers, summed)
    # Layers of one sum that need several launches are summed per launch, in float32.
    dtype = hidden[0].dtype if weights is None or groups == 1 else torch.float32
    maps = hidden[0].new_empty(groups, batch, patches, width, dtype=dtype)
    tile = tiles(hidden[0], width, accumulators=1 if weights is None else 2)
    for first in range(0, layers, LAYERS):
        part = slice(first, min(first + LAYERS, layers))
        launch(
            _gather, (cdiv(part.stop - first, summed) * cdiv(rows, tile["ROWS"]),),
            *padded(hidden[part]), shared_weight, shared_bias, norm_weight[part], norm_bias[part], projection[part],
            None if weights is None else weights[part], maps[first // summed :],
            rows, patches, tokens - patches, *hidden[0].stride()[:2], channels, width, shared_eps, norm_eps,
            SUMMED=min(summed, part.stop - first), WEIGHTED=weights is not None, **tile, PRECISION=precision(),
        )  # fmt: skip
    if weights is None:
        return maps
    return maps[0] if groups == 1 else maps.sum(0).to(hidden[0].dtype)
