"""Shared by the layer gather's forward and backward: a tile's rows, normalised twice and projected."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .common.launch import block, sizes
from .common.math import dot

EPS = tl.constexpr(1e-12)  # torch.nn.functional.normalize
LAYERS = 8  # per launch: Triton takes each layer's hidden states as a separate argument

# A program needs all E columns of its rows for their length. By bytes of an element: accumulators that it holds, and
# elements of the projection that it reads at a time. Float32 products without TF32 need more registers.
ACCUMULATORS = {2: 32768, 4: 8192}
ELEMENTS = {2: 16384, 4: 8192}
WIDE = 128  # channels that it reads at a time for the statistics


def tiles(tokens: Tensor, width: int, accumulators: int = 1) -> dict[str, int]:
    """Rows, columns and channels of a program that holds so many (ROWS, WIDTH) accumulators; its warps and stages."""
    columns = block(width, most=1024)
    rows = min(64, max(16, sizes(ACCUMULATORS, tokens) // accumulators // columns))
    channels = min(64, max(16, sizes(ELEMENTS, tokens) // columns))
    # Three stages keep two chunks of the projection in shared memory; so do two stages where Hopper's products of 64
    # rows keep one more. One chunk has to do where two are too large for a consumer card.
    return {
        "ROWS": rows,
        "WIDTH": columns,
        "CHANNELS": channels,
        "WIDE": block(tokens.shape[-1], most=WIDE),
        "warps": 8,
        "stages": 2 if rows == 64 or channels * columns * tokens.element_size() > 32768 else 3,
    }


@triton.jit
def of_layer(layer, h0, h1, h2, h3, h4, h5, h6, h7):
    """The hidden states of one layer of a launch."""
    tokens = tl.where(layer == 1, h1, h0)
    tokens = tl.where(layer == 2, h2, tokens)
    tokens = tl.where(layer == 3, h3, tokens)
    tokens = tl.where(layer == 4, h4, tokens)
    tokens = tl.where(layer == 5, h5, tokens)
    tokens = tl.where(layer == 6, h6, tokens)
    return tl.where(layer == 7, h7, tokens)


@triton.jit
def statistics(
    tokens, row_mask, shared_weight, shared_bias, channels, shared_eps, norm_eps,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """mean(x), 1 / √(var(x) + eps), mean(u), 1 / √(var(u) + eps), each (ROWS, 1), of the rows at `tokens` (ROWS, 1).
    Deviations are squared once the mean is known: squares of the elements themselves would cancel."""
    x_sum = tl.zeros((ROWS, 1), tl.float32)
    for start in range(0, channels, WIDE):
        col = start + tl.arange(0, WIDE)[None, :]
        x = tl.load(tokens + col, mask=row_mask & (col < channels), other=0.0).to(tl.float32)
        x_sum += tl.sum(x, 1, keep_dims=True)
    x_mean = x_sum / channels
    squares = tl.zeros((ROWS, 1), tl.float32)
    weighted = tl.zeros((ROWS, 1), tl.float32)
    bias_sum = tl.zeros((1, 1), tl.float32)
    for start in range(0, channels, WIDE):
        col = start + tl.arange(0, WIDE)[None, :]
        x = tl.load(tokens + col, mask=row_mask & (col < channels), other=0.0).to(tl.float32)
        centred = tl.where(col < channels, x - x_mean, 0.0)
        squares += tl.sum(centred * centred, 1, keep_dims=True)
        weight = tl.load(shared_weight + col, mask=col < channels, other=0.0).to(tl.float32)
        weighted += tl.sum(centred * weight, 1, keep_dims=True)
        bias = tl.load(shared_bias + col, mask=col < channels, other=0.0).to(tl.float32)
        bias_sum += tl.sum(bias, 1, keep_dims=True)
    x_scale = 1.0 / tl.sqrt(squares / channels + shared_eps)
    u_mean = (weighted * x_scale + bias_sum) / channels
    squares = tl.zeros((ROWS, 1), tl.float32)
    for start in range(0, channels, WIDE):
        col = start + tl.arange(0, WIDE)[None, :]
        x = tl.load(tokens + col, mask=row_mask & (col < channels), other=0.0).to(tl.float32)
        weight = tl.load(shared_weight + col, mask=col < channels, other=0.0).to(tl.float32)
        bias = tl.load(shared_bias + col, mask=col < channels, other=0.0).to(tl.float32)
        centred = tl.where(col < channels, (x - x_mean) * x_scale * weight + bias - u_mean, 0.0)
        squares += tl.sum(centred * centred, 1, keep_dims=True)
    return x_mean, x_scale, u_mean, 1.0 / tl.sqrt(squares / channels + norm_eps)


@triton.jit
def project(
    tokens, row_mask, shared_weight, shared_bias, norm_weight, norm_bias, projection, normed,
    channels, width, shared_eps, norm_eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    STORE_Y: tl.constexpr,
):  # fmt: skip
    """z and n, (ROWS, WIDTH) and (ROWS, 1), of the rows at `tokens`; y is stored at `normed` (ROWS, 1) if STORE_Y."""
    x_mean, x_scale, u_mean, u_scale = statistics(
        tokens, row_mask, shared_weight, shared_bias, channels, shared_eps, norm_eps, ROWS, WIDE
    )
    col = tl.arange(0, WIDTH)[None, :]
    z = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, channels, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        mask = row_mask & (c < channels)[None, :]
        x = tl.load(tokens + c[None, :], mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(shared_weight + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
        bias = tl.load(shared_bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
        u = (x - x_mean) * x_scale * weight + bias
        weight = tl.load(norm_weight + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
        bias = tl.load(norm_bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
        y = (u - u_mean) * u_scale * weight + bias
        y = tl.where((c < channels)[None, :], y, 0.0).to(projection.dtype.element_ty)
        if STORE_Y:
            tl.store(normed + c[None, :], y, mask=mask)
        p = tl.load(projection + c[:, None] * width + col, mask=(c < channels)[:, None] & (col < width), other=0.0)
        z = dot(y, p, z, PRECISION)
    squares = tl.sum(tl.where(col < width, z * z, 0.0), 1, keep_dims=True)
    return z, tl.maximum(tl.sqrt(squares), EPS, propagate_nan=tl.PropagateNan.ALL)


def padded(hidden: Sequence[Tensor]) -> list[Tensor]:
    """As many tensors as a launch takes."""
    return [*hidden, *[hidden[-1]] * (LAYERS - len(hidden))]
