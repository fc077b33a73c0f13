"""Device functions that several kernels share."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Triton's interpreter multiplies the bit patterns of bfloat16 numbers; widened first, their products are exact.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a · b, summed in float32; a and b have one dtype, float32 is multiplied in PRECISION."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """A float32 block in DTYPE, rounded to nearest: Triton's interpreter truncates to bfloat16, unlike a GPU."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < float("inf"), nearest, x)
    return x.to(DTYPE)


@triton.jit
def standardise(x, mask, channels, eps):
    """(x − mean) / √(variance + eps) along the last axis of a float32 block (rows, CHANNELS), of which the first
    `channels` columns count (`mask`, (1, CHANNELS)); the rest is 0. Returns it and 1 / √(variance + eps), (rows, 1)."""
    mean = tl.sum(tl.where(mask, x, 0.0), 1, keep_dims=True) / channels
    centred = tl.where(mask, x - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1, keep_dims=True) / channels + eps)
    return centred * scale, scale


@triton.jit
def standardise_backward(grad, standardised, scale, mask, channels):
    """Gradient of `standardise`'s x from `grad`, that of its result: scale · (g − mean(g) − x̂ · mean(g · x̂))."""
    grad = tl.where(mask, grad, 0.0)
    mean = tl.sum(grad, 1, keep_dims=True) / channels
    along = tl.sum(grad * standardised, 1, keep_dims=True) / channels
    return tl.where(mask, scale * (grad - mean - standardised * along), 0.0)
