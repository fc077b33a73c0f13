"""Backward of the layer gather and of its weighted sum over layers; names are those of `layer_gather`.

From the gradient d of a layer's map, w · d for a sum over layers (w = 1 otherwise), with y, z and n recomputed:

    dw = Σ <d, f>                       over all patches
    dz = (w · d − f · <w · d, f>) / n   the second term is 0 where ‖z‖ < ε
    dy = dz · Pᵀ,                       dP = Σ yᵀ · dz
    dg = Σ dy · û,   db = Σ dy,         du = norm'(g · dy; u)
    da = Σ du · x̂,   dc = Σ du,         dx = norm'(a · du; x)

with norm'(h; v) = (h − mean(h) − v̂ · mean(h · v̂)) / √(var(v) + eps). The two matrix products are PyTorch's. Sums over
rows are taken per chunk of rows, then over the chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import block, cdiv, launch, precision
from .common.math import standardise, standardise_backward
from .layer_gather_tokens import EPS, LAYERS, of_layer, padded, project, tiles

CHUNK = 16  # rows that a program of `_norms_backward` sums over
VALUES = 2048  # elements of each of its tensors that it holds at a time


@triton.jit
def _projection_backward(
    grad, h0, h1, h2, h3, h4, h5, h6, h7, shared_weight, shared_bias, norm_weight, norm_bias, projection, weights,
    z_grad, y, weight_sums,
    rows, patches, first_patch, batch_stride, token_stride, grad_stride, channels, width, shared_eps, norm_eps,
    WEIGHTED: tl.constexpr, STORE_Y: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dz of a tile of rows of one layer, y if STORE_Y, and the tile's part of dw if WEIGHTED."""
    row_tiles = tl.cdiv(rows, ROWS)
    layer = tl.program_id(0) // row_tiles
    tile = tl.program_id(0) % row_tiles
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    offset = (row // patches).to(tl.int64) * batch_stride + (first_patch + row % patches).to(tl.int64) * token_stride
    layer_row = layer.to(tl.int64) * rows + row
    z, length = project(
        of_layer(layer, h0, h1, h2, h3, h4, h5, h6, h7) + offset, row < rows, shared_weight, shared_bias,
        norm_weight + layer * channels, norm_bias + layer * channels, projection + layer * channels * width,
        y + layer_row * channels, channels, width, shared_eps, norm_eps, ROWS, WIDTH, CHANNELS, WIDE, PRECISION,
        STORE_Y,
    )  # fmt: skip
    col = tl.arange(0, WIDTH)[None, :]
    mask = (row < rows) & (col < width)
    f = z / length
    d = tl.load(grad + layer.to(tl.int64) * grad_stride + row.to(tl.int64) * width + col, mask=mask, other=0.0)
    d = d.to(tl.float32)
    inner = tl.sum(tl.where(mask, d * f, 0.0), 1, keep_dims=True)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weights + layer).to(tl.float32)
        tl.store(weight_sums + tl.program_id(0), tl.sum(inner))
    inner = tl.where(length <= EPS, 0.0, inner)
    tl.store(z_grad + layer_row * width + col, weight * (d - f * inner) / length, mask=mask)


@triton.jit
def _norms_backward(
    y_grad, h0, h1, h2, h3, h4, h5, h6, h7, shared_weight, shared_bias, norm_weight, norm_bias, hidden_grad, sums,
    batch, tokens, patches, batch_stride, token_stride, channels, shared_eps, norm_eps,
    HIDDEN: tl.constexpr, SUMS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """From dy, dx of a chunk of one layer's tokens if HIDDEN, 0 if not patches; its da, dc, dg and db if SUMS."""
    chunks = tl.cdiv(batch * tokens, CHUNK)
    layer = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    hidden = of_layer(layer, h0, h1, h2, h3, h4, h5, h6, h7)
    col = tl.arange(0, CHANNELS)[None, :]
    col_mask = col < channels
    a = tl.load(shared_weight + col, mask=col_mask, other=0.0).to(tl.float32)
    c = tl.load(shared_bias + col, mask=col_mask, other=0.0).to(tl.float32)
    g = tl.load(norm_weight + layer * channels + col, mask=col_mask, other=0.0).to(tl.float32)
    a_acc = tl.zeros((1, CHANNELS), tl.float32)
    c_acc = tl.zeros((1, CHANNELS), tl.float32)
    g_acc = tl.zeros((1, CHANNELS), tl.float32)
    b_acc = tl.zeros((1, CHANNELS), tl.float32)
    for start in range(0, CHUNK, ROWS):
        row = chunk * CHUNK + start + tl.arange(0, ROWS)[:, None]
        image = (row // tokens).to(tl.int64)
        patch = row % tokens - (tokens - patches)
        mask = (row < batch * tokens) & (patch >= 0) & col_mask
        offset = image * batch_stride + (row % tokens).to(tl.int64) * token_stride + col
        x = tl.load(hidden + offset, mask=mask, other=0.0).to(tl.float32)
        x, x_scale = standardise(x, col_mask, channels, shared_eps)
        u, u_scale = standardise(x * a + c, col_mask, channels, norm_eps)
        offset = ((layer.to(tl.int64) * batch + image) * patches + patch) * channels + col
        dy = tl.load(y_grad + offset, mask=mask, other=0.0).to(tl.float32)
        du = standardise_backward(dy * g, u, u_scale, col_mask, channels)
        if SUMS:
            b_acc += tl.sum(dy, 0, keep_dims=True)
            g_acc += tl.sum(dy * u, 0, keep_dims=True)
            c_acc += tl.sum(du, 0, keep_dims=True)
            a_acc += tl.sum(du * x, 0, keep_dims=True)
        if HIDDEN:
            dx = tl.where(mask, standardise_backward(du * a, x, x_scale, col_mask, channels), 0.0)
            offset = (layer.to(tl.int64) * batch * tokens + row) * channels + col
            tl.store(hidden_grad + offset, dx, mask=(row < batch * tokens) & col_mask)
    if SUMS:
        sums += tl.program_id(0).to(tl.int64) * 4 * channels + col
        tl.store(sums, a_acc, mask=col_mask)
        tl.store(sums + channels, c_acc, mask=col_mask)
        tl.store(sums + 2 * channels, g_acc, mask=col_mask)
        tl.store(sums + 3 * channels, b_acc, mask=col_mask)


def projection_backward(
    grad: Tensor, hidden: Sequence[Tensor], patches: int, norms: Sequence[Tensor], shared_eps: float, norm_eps: float,
    projection: Tensor, weights: Tensor | None, need_y: bool, need_weights: bool,
) -> tuple[Tensor, Tensor | None, None, Tensor | None]:  # fmt: skip
    """dz (L, B · S, E), y (L, B · S, D) if needed, no statistics: `norms_backward` recomputes them, and dw (L,)."""
    like, layers = hidden[0], len(hidden)
    batch, tokens, channels = like.shape
    rows, width = batch * patches, projection.shape[-1]
    shared_weight, shared_bias, norm_weight, norm_bias = norms
    tile = tiles(like, width, accumulators=2)
    row_tiles = cdiv(rows, tile["ROWS"])
    z_grad = like.new_empty(layers, rows, width)
    y = like.new_empty(layers, rows, channels) if need_y else None
    weight_sums = like.new_empty(layers, row_tiles, dtype=torch.float32)
    for first in range(0, layers, LAYERS):
        part = slice(first, min(first + LAYERS, layers))
        launch(
            _projection_backward, ((part.stop - first) * row_tiles,),
            grad[part] if weights is None else grad, *padded(hidden[part]), shared_weight, shared_bias,
            norm_weight[part], norm_bias[part], projection[part], None if weights is None else weights[part],
            z_grad[part], (z_grad if y is None else y)[part], weight_sums[part],
            rows, patches, tokens - patches, *like.stride()[:2], rows * width if weights is None else 0,
            channels, width, shared_eps, norm_eps,
            WEIGHTED=weights is not None, STORE_Y=need_y, **tile, PRECISION=precision(),
        )  # fmt: skip
    return z_grad, y, None, weight_sums.sum(1).to(like.dtype) if need_weights else None


def norms_backward(
    y_grad: Tensor, hidden: Sequence[Tensor], patches: int, norms: Sequence[Tensor], shared_eps: float,
    norm_eps: float, statistics: None, need_hidden: bool, need_norms: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dx (L, B, N, D), and da, dc, dg and db summed over chunks of tokens, float32 (L, chunks, 4, D)."""
    like, layers = hidden[0], len(hidden)
    batch, tokens, channels = like.shape
    shared_weight, shared_bias, norm_weight, norm_bias = norms
    chunks = cdiv(batch * tokens, CHUNK)
    hidden_grad = like.new_empty(layers, *like.shape) if need_hidden else None
    sums = like.new_empty(layers, chunks, 4, channels, dtype=torch.float32) if need_norms else None
    columns = block(channels, most=2**20)
    for first in range(0, layers, LAYERS):
        part = slice(first, min(first + LAYERS, layers))
        launch(
            _norms_backward, ((part.stop - first) * chunks,),
            y_grad[part], *padded(hidden[part]), shared_weight, shared_bias, norm_weight[part], norm_bias[part],
            None if hidden_grad is None else hidden_grad[part], None if sums is None else sums[part],
            batch, tokens, patches, *like.stride()[:2], channels, shared_eps, norm_eps,
            HIDDEN=need_hidden, SUMS=need_norms, CHUNK=CHUNK, ROWS=min(CHUNK, max(1, VALUES // columns)),
            CHANNELS=columns,
        )  # fmt: skip
    return hidden_grad, sums
