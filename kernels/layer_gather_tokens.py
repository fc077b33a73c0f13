"""What the forward and the backward of the layer gather share: a tile's rows normalised twice and projected."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .common.launch import block, sizes
from .common.math import dot

EPS = tl.constexpr(1e-12)  # torch.nn.functional.normalize
LAYERS = 8  # whose hidden states one launch takes: Triton wants each tensor as an argument of its own

# A program needs all E columns of its rows for their length. By bytes of an element: sums that it holds, and entries of
# the projection that it reads at a time. Float32 products do not run on tensor cores unless TF32 is allowed, and their
# unrolled form needs the registers.
SUMS = {2: 32768, 4: 8192}
ENTRIES = {2: 16384, 4: 8192}
WIDE = 128  # channels that it reads at a time for the statistics


def tiles(tokens: Tensor, out: int, sums: int = 1) -> dict[str, int]:
    """Rows, columns and channels of a program that holds `sums` blocks (ROWS, OUT), its warps and pipeline stages."""
    columns = block(out, most=1024)
    rows = min(64, max(16, sizes(SUMS, tokens) // sums // columns))
    channels = min(64, max(16, sizes(ENTRIES, tokens) // columns))
    # Two chunks of the projection lie in shared memory at a time: three stages, but two where Hopper's products of 64
    # rows keep one chunk more. Where they are too large for a consumer card, one chunk does.
    return {
        "ROWS": rows,
        "OUT": columns,
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
    tokens, rows, shared_weight, shared_bias, channels, shared_eps, norm_eps, ROWS: tl.constexpr, WIDE: tl.constexpr
):
    """mean(x), 1 / √(var(x) + eps), mean(u), 1 / √(var(u) + eps), each (ROWS, 1), of the rows at `tokens` (ROWS, 1).

    Deviations are squared after the mean is known: squares of the elements themselves would cancel.
    """
    sums = tl.zeros((ROWS, 1), tl.float32)
    for start in range(0, channels, WIDE):
        c = start + tl.arange(0, WIDE)[None, :]
        sums += tl.sum(tl.load(tokens + c, mask=rows & (c < channels), other=0.0).to(tl.float32), 1, keep_dims=True)
    x_mean = sums / channels
    squares = tl.zeros((ROWS, 1), tl.float32)
    along = tl.zeros((ROWS, 1), tl.float32)
    offset = tl.zeros((1, 1), tl.float32)
    for start in range(0, channels, WIDE):
        c = start + tl.arange(0, WIDE)[None, :]
        x = tl.load(tokens + c, mask=rows & (c < channels), other=0.0).to(tl.float32)
        centred = tl.where(c < channels, x - x_mean, 0.0)
        squares += tl.sum(centred * centred, 1, keep_dims=True)
        weight = tl.load(shared_weight + c, mask=c < channels, other=0.0).to(tl.float32)
        along += tl.sum(centred * weight, 1, keep_dims=True)
        bias = tl.load(shared_bias + c, mask=c < channels, other=0.0).to(tl.float32)
        offset += tl.sum(bias, 1, keep_dims=True)
    x_scale = 1.0 / tl.sqrt(squares / channels + shared_eps)
    u_mean = (along * x_scale + offset) / channels
    squares = tl.zeros((ROWS, 1), tl.float32)
    for start in range(0, channels, WIDE):
        c = start + tl.arange(0, WIDE)[None, :]
        x = tl.load(tokens + c, mask=rows & (c < channels), other=0.0).to(tl.float32)
        weight = tl.load(shared_weight + c, mask=c < channels, other=0.0).to(tl.float32)
        bias = tl.load(shared_bias + c, mask=c < channels, other=0.0).to(tl.float32)
        centred = tl.where(c < channels, (x - x_mean) * x_scale * weight + bias - u_mean, 0.0)
        squares += tl.sum(centred * centred, 1, keep_dims=True)
    return x_mean, x_scale, u_mean, 1.0 / tl.sqrt(squares / channels + norm_eps)


@triton.jit
def project(
    tokens, rows, shared_weight, shared_bias, norm_weight, norm_bias, projection, normed,
    channels, out, shared_eps, norm_eps,
    ROWS: tl.constexpr, OUT: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """z and n, (ROWS, OUT) and (ROWS, 1), of the rows at `tokens`; y is stored at `normed` (ROWS, 1) where KEEP."""
    x_mean, x_scale, u_mean, u_scale = statistics(
        tokens, rows, shared_weight, shared_bias, channels, shared_eps, norm_eps, ROWS, WIDE
    )
    e = tl.arange(0, OUT)[None, :]
    z = tl.zeros((ROWS, OUT), tl.float32)
    for start in range(0, channels, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        inside = (c < channels)[None, :]
        x = tl.load(tokens + c[None, :], mask=rows & inside, other=0.0).to(tl.float32)
        weight = tl.load(shared_weight + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
        bias = tl.load(shared_bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
        u = (x - x_mean) * x_scale * weight + bias
        weight = tl.load(norm_weight + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
        bias = tl.load(norm_bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
        y = tl.where(inside, (u - u_mean) * u_scale * weight + bias, 0.0).to(projection.dtype.element_ty)
        if KEEP:
            tl.store(normed + c[None, :], y, mask=rows & inside)
        p = tl.load(projection + c[:, None] * out + e, mask=(c < channels)[:, None] & (e < out), other=0.0)
        z = dot(y, p, z, PRECISION)
    squares = tl.sum(tl.where(e < out, z * z, 0.0), 1, keep_dims=True)
    return z, tl.maximum(tl.sqrt(squares), EPS, propagate_nan=tl.PropagateNan.ALL)


def aligned(hidden: Sequence[Tensor]) -> list[Tensor]:
    """The hidden states with equal strides, the last one 1: as they are where they have them, else copies."""
    first = hidden[0].stride()
    if first[-1] == 1 and all(tokens.stride() == first for tokens in hidden):
        return list(hidden)
    return [tokens.contiguous() for tokens in hidden]


def padded(hidden: Sequence[Tensor]) -> list[Tensor]:
    """As many tensors as a launch takes."""
    return [*hidden, *[hidden[-1]] * (LAYERS - len(hidden))]
