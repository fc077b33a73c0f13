"""Tokens of class aggregation: average pooling and LayerNorm before the attention, and their backward.

Tokens are numbered (b, t, y, x) on the pooled maps; the padding class, if there is one, follows the last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import block, cdiv, launch, sizes
from .common.math import rounded, standardise, standardise_backward

EPS = tl.constexpr(1e-5)  # torch.nn.functional.layer_norm
ROWS = {2: 32, 4: 16}  # tokens in a tile, by bytes of an element


@triton.jit
def pooled_place(row, height, width, pooling):
    """The first of the tokens of x whose mean is pooled token `row`."""
    columns = width // pooling
    lines = height // pooling
    maps = row // (lines * columns)
    place = row % (lines * columns)
    return (maps * height + place // columns * pooling) * width + place % columns * pooling


@triton.jit
def pooled(x, row, c, mask, height, width, channels, pooling):
    """Pooled tokens `row` of x at channels `c`, in float32."""
    first = pooled_place(row, height, width, pooling)[:, None]
    total = tl.zeros(mask.shape, tl.float32)
    for i in range(pooling * pooling):
        place = first + i // pooling * width + i % pooling
        total += tl.load(x + place * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
    return total / (pooling * pooling)


@triton.jit
def _normalise(
    x, padding, norm_weight, norm_bias, normed, tokens, rows, height, width, channels, pooling,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """n of all tokens, and of the padding class if `rows` counts it too."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)
    inside = (c < channels)[None, :]
    token = pooled(x, row, c, (row < tokens)[:, None] & inside, height, width, channels, pooling)
    extra = (row >= tokens)[:, None] & (row < rows)[:, None] & inside
    token += tl.load(padding + c[None, :] + row[:, None] * 0, mask=extra, other=0.0).to(tl.float32)
    standard, _ = standardise(token, inside, channels, EPS)
    weight = tl.load(norm_weight + c, mask=c < channels, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias + c, mask=c < channels, other=0.0).to(tl.float32)
    target = normed + row[:, None] * channels + c[None, :]
    n = rounded(standard * weight[None, :] + bias[None, :], normed.dtype.element_ty)
    tl.store(target, n, mask=(row < rows)[:, None] & inside)


@triton.jit
def _normalise_backward(
    grad, normed_grad, x, padding, norm_weight, x_grad, padding_grad, weight_sums, bias_sums,
    tokens, rows, height, width, channels, pooling,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """dx from the gradients of y and n; partial sums of the gradients of weight and bias, one row a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)
    inside = (c < channels)[None, :]
    real = (row < tokens)[:, None] & inside
    extra = (row >= tokens)[:, None] & (row < rows)[:, None] & inside
    token = pooled(x, row, c, real, height, width, channels, pooling)
    token += tl.load(padding + c[None, :] + row[:, None] * 0, mask=extra, other=0.0).to(tl.float32)
    standard, scale = standardise(token, inside, channels, EPS)
    weight = tl.load(norm_weight + c, mask=c < channels, other=0.0).to(tl.float32)
    place = row[:, None] * channels + c[None, :]
    g = tl.load(normed_grad + place, mask=real | extra, other=0.0).to(tl.float32)
    if SUMS:
        out = tl.program_id(0).to(tl.int64) * channels + c
        tl.store(weight_sums + out, tl.sum(g * standard, 0), mask=c < channels)
        tl.store(bias_sums + out, tl.sum(g, 0), mask=c < channels)
    g = standardise_backward(g * weight[None, :], standard, scale, inside, channels)
    dtype = x.dtype.element_ty
    tl.store(padding_grad + c[None, :] + row[:, None] * 0, rounded(g, dtype), mask=extra)
    g += tl.load(grad + place, mask=real, other=0.0).to(tl.float32)
    g = rounded(g / (pooling * pooling), dtype)
    first = pooled_place(row, height, width, pooling)[:, None]
    for i in range(pooling * pooling):
        target = first + i // pooling * width + i % pooling
        tl.store(x_grad + target * channels + c[None, :], g, mask=real)


def row_tile(x: Tensor) -> dict[str, int]:
    """Tile of the element-wise kernels, which hold whole tokens."""
    return {"ROWS": sizes(ROWS, x), "CHANNELS": block(x.shape[-1], 16, 1 << 20)}


def normed_tokens(
    x: Tensor, padding: Tensor, norm_weight: Tensor, norm_bias: Tensor, pads: int, pooling: int
) -> Tensor:
    """n, (tokens, or one more if there are pads, C)."""
    batch, classes, height, width, channels = x.shape
    tokens = batch * classes * (height // pooling) * (width // pooling)
    rows = tokens + (pads > 0)
    normed = x.new_empty(rows, channels)
    tile = row_tile(x)
    launch(
        _normalise, (cdiv(rows, tile["ROWS"]),),
        x, padding, norm_weight, norm_bias, normed, tokens, rows, height, width, channels, pooling, **tile,
    )  # fmt: skip
    return normed


def tokens_backward(
    normed_grad: Tensor, grad: Tensor, x: Tensor, padding: Tensor, norm_weight: Tensor, norm_bias: Tensor, _: None,
    pads: int, pooling: int, parameters: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """dx, gradients of the norm's weight and bias, if `parameters`, and of the padding class, from dn and g."""
    batch, classes, height, width, channels = x.shape
    tokens = batch * classes * (height // pooling) * (width // pooling)
    rows = tokens + (pads > 0)
    dropped = height % pooling or width % pooling  # tokens that no mean holds
    x_grad = torch.zeros_like(x) if dropped else torch.empty_like(x)
    padding_grad = torch.empty_like(padding) if pads else torch.zeros_like(padding)
    tile = row_tile(x)
    programs = cdiv(rows, tile["ROWS"])
    sums = x.new_empty(2, programs if parameters else 0, channels, dtype=torch.float32)
    launch(
        _normalise_backward, (programs,),
        grad, normed_grad, x, padding, norm_weight, x_grad, padding_grad, sums[0], sums[1],
        tokens, rows, height, width, channels, pooling, **tile, SUMS=parameters,
    )  # fmt: skip
    gain, offset = (part.sum(0).to(x.dtype) if parameters else None for part in sums)
    return x_grad, gain, offset, padding_grad
