"""Backward of the layer gather and of its weighted sum over layers; names are those of `layer_gather`.

From the gradient d of the layer's map, w · d in a sum over layers (w = 1 alone), with y, z and n worked out again:

    dw = Σ <d, f>                       over all patches
    dz = (w · d − f · <w · d, f>) / n   the second term is 0 where ‖z‖ < ε
    dy = dz · Pᵀ,                       dP = Σ yᵀ · dz
    dg = Σ dy · û,   db = Σ dy,         du = norm'(g · dy; u)
    da = Σ du · x̂,   dc = Σ du,         dx = norm'(a · du; x)

with norm'(h; v) = (h − mean(h) − v̂ · mean(h · v̂)) / √(var(v) + eps). The two products are the matrix library's, on dz
and y as they are stored between the kernels. Sums over rows are taken a chunk of rows at a time, then over the chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import block, cdiv, launch, precision
from .common.math import standardise, standardise_backward
from .layer_gather_tokens import EPS, LAYERS, aligned, of_layer, padded, project, tiles

CHUNK = 16  # rows that a program of `_hidden` sums over
VALUES = 2048  # that it holds of each of its rows' tensors at a time


@triton.jit
def _projected(
    grad, h0, h1, h2, h3, h4, h5, h6, h7, shared_weight, shared_bias, norm_weight, norm_bias, projection, weights,
    projected, normed, weight_sums,
    rows, patches, skipped, batch_stride, token_stride, grad_stride, channels, out, shared_eps, norm_eps,
    WEIGHTED: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dz of a tile of rows of one layer, y where KEEP, and the tile's part of dw where WEIGHTED."""
    row_tiles = tl.cdiv(rows, ROWS)
    layer = tl.program_id(0) // row_tiles
    tile = tl.program_id(0) % row_tiles
    r = tile * ROWS + tl.arange(0, ROWS)[:, None]
    place = (r // patches).to(tl.int64) * batch_stride + (skipped + r % patches).to(tl.int64) * token_stride
    row = layer.to(tl.int64) * rows + r
    z, length = project(
        of_layer(layer, h0, h1, h2, h3, h4, h5, h6, h7) + place, r < rows, shared_weight, shared_bias,
        norm_weight + layer * channels, norm_bias + layer * channels, projection + layer * channels * out,
        normed + row * channels, channels, out, shared_eps, norm_eps, ROWS, OUT, CHANNELS, WIDE, PRECISION, KEEP,
    )  # fmt: skip
    e = tl.arange(0, OUT)[None, :]
    mask = (r < rows) & (e < out)
    f = z / length
    d = tl.load(grad + layer.to(tl.int64) * grad_stride + r.to(tl.int64) * out + e, mask=mask, other=0.0)
    d = d.to(tl.float32)
    along = tl.sum(tl.where(mask, d * f, 0.0), 1, keep_dims=True)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weights + layer).to(tl.float32)
        tl.store(weight_sums + tl.program_id(0), tl.sum(along))
    along = tl.where(length <= EPS, 0.0, along)
    tl.store(projected + row * out + e, weight * (d - f * along) / length, mask=mask)


@triton.jit
def _hidden(
    grad, h0, h1, h2, h3, h4, h5, h6, h7, shared_weight, shared_bias, norm_weight, norm_bias, hidden_grad, sums,
    batch, tokens, patches, batch_stride, token_stride, channels, shared_eps, norm_eps,
    HIDDEN: tl.constexpr, SUMS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """From dy, dx of a chunk of one layer's tokens where HIDDEN, 0 for those that are no patches, and the chunk's part
    of da, dc, dg and db where SUMS."""
    chunks = tl.cdiv(batch * tokens, CHUNK)
    layer = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    x_at = of_layer(layer, h0, h1, h2, h3, h4, h5, h6, h7)
    c = tl.arange(0, CHANNELS)[None, :]
    inside = c < channels
    a = tl.load(shared_weight + c, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shared_bias + c, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(norm_weight + layer * channels + c, mask=inside, other=0.0).to(tl.float32)
    a_sum = tl.zeros((1, CHANNELS), tl.float32)
    c_sum = tl.zeros((1, CHANNELS), tl.float32)
    g_sum = tl.zeros((1, CHANNELS), tl.float32)
    b_sum = tl.zeros((1, CHANNELS), tl.float32)
    for start in range(0, CHUNK, ROWS):
        r = chunk * CHUNK + start + tl.arange(0, ROWS)[:, None]
        image = (r // tokens).to(tl.int64)
        patch = r % tokens - (tokens - patches)
        mask = (r < batch * tokens) & (patch >= 0) & inside
        x = tl.load(x_at + image * batch_stride + (r % tokens).to(tl.int64) * token_stride + c, mask=mask, other=0.0)
        x, x_scale = standardise(x.to(tl.float32), inside, channels, shared_eps)
        u, u_scale = standardise(x * a + shift, inside, channels, norm_eps)
        row = (layer.to(tl.int64) * batch + image) * patches + patch
        dy = tl.load(grad + row * channels + c, mask=mask, other=0.0).to(tl.float32)
        du = standardise_backward(dy * g, u, u_scale, inside, channels)
        if SUMS:
            b_sum += tl.sum(dy, 0, keep_dims=True)
            g_sum += tl.sum(dy * u, 0, keep_dims=True)
            c_sum += tl.sum(du, 0, keep_dims=True)
            a_sum += tl.sum(du * x, 0, keep_dims=True)
        if HIDDEN:
            dx = tl.where(mask, standardise_backward(du * a, x, x_scale, inside, channels), 0.0)
            row = layer.to(tl.int64) * batch * tokens + r
            tl.store(hidden_grad + row * channels + c, dx, mask=(r < batch * tokens) & inside)
    if SUMS:
        at = sums + tl.program_id(0).to(tl.int64) * 4 * channels + c
        tl.store(at, a_sum, mask=inside)
        tl.store(at + channels, c_sum, mask=inside)
        tl.store(at + 2 * channels, g_sum, mask=inside)
        tl.store(at + 3 * channels, b_sum, mask=inside)


def gather_backward(
    grad: Tensor, hidden: Sequence[Tensor], patches: int, shared_weight: Tensor, shared_bias: Tensor,
    norm_weight: Tensor, norm_bias: Tensor, projection: Tensor, weights: Tensor | None,
    shared_eps: float, norm_eps: float,
    need_hidden: bool, need_norms: bool, need_projection: bool, need_weights: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """From the gradient (L, B, S, E) of the layers' maps or, with weights (L,), (B, S, E) of their sum: the gradients
    of the hidden states (L, B, N, D), the five parameters and the weights; an empty tensor where none is needed."""
    hidden, grad = aligned(hidden), grad.contiguous()
    like, layers = hidden[0], len(hidden)
    batch, tokens, channels = like.shape
    rows, out = batch * patches, projection.shape[-1]
    tile = tiles(like, out, sums=2)
    row_tiles = cdiv(rows, tile["ROWS"])
    shared_weight, shared_bias = shared_weight.contiguous(), shared_bias.contiguous()
    norm_weight, norm_bias, projection = norm_weight.contiguous(), norm_bias.contiguous(), projection.contiguous()

    projected = like.new_empty(layers, rows, out)
    normed = like.new_empty(layers, rows, channels) if need_projection else projected
    weight_sums = like.new_empty(layers, row_tiles, dtype=torch.float32)
    for first in range(0, layers, LAYERS):
        part = slice(first, min(first + LAYERS, layers))
        launch(
            _projected, ((part.stop - first) * row_tiles,),
            grad if weights is not None else grad[part], *padded(hidden[part]), shared_weight, shared_bias,
            norm_weight[part], norm_bias[part], projection[part], None if weights is None else weights[part],
            projected[part], normed[part], weight_sums[part],
            rows, patches, tokens - patches, *like.stride()[:2], rows * out if weights is None else 0, channels, out,
            shared_eps, norm_eps,
            WEIGHTED=weights is not None, KEEP=need_projection, **tile, PRECISION=precision(),
        )  # fmt: skip

    chunks = cdiv(batch * tokens, CHUNK)
    hidden_grad = like.new_empty((layers, batch, tokens, channels) if need_hidden else 0)
    sums = like.new_empty((layers, chunks, 4, channels) if need_norms else 0, dtype=torch.float32)
    if need_hidden or need_norms:
        normed_grad = torch.bmm(projected, projection.transpose(1, 2))
        width = block(channels, most=2**20)
        for first in range(0, layers, LAYERS):
            part = slice(first, min(first + LAYERS, layers))
            launch(
                _hidden, ((part.stop - first) * chunks,),
                normed_grad[part], *padded(hidden[part]), shared_weight, shared_bias, norm_weight[part],
                norm_bias[part], hidden_grad[part], sums[part],
                batch, tokens, patches, *like.stride()[:2], channels, shared_eps, norm_eps,
                HIDDEN=need_hidden, SUMS=need_norms, CHUNK=CHUNK, ROWS=min(CHUNK, max(1, VALUES // width)),
                CHANNELS=width,
            )  # fmt: skip

    norms = [like.new_empty(0) for _ in range(4)]
    if need_norms:
        by_layer = sums.sum(1)
        shared, own = by_layer[:, :2].sum(0), by_layer[:, 2:]
        norms = [part.to(like.dtype, copy=True) for part in (*shared, *own.unbind(1))]
    return (
        hidden_grad,
        *norms,
        torch.bmm(normed.transpose(1, 2), projected) if need_projection else like.new_empty(0),
        weight_sums.sum(1).to(like.dtype) if need_weights else like.new_empty(0),
    )
