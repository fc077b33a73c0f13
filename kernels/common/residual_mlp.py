"""Residual MLP, the second half of both aggregation blocks, on rows of C channels with M hidden units:

    n = LN(x),   a = W₁ n + b₁,   out = x + W₂ act(a) + b₂

Hidden units are processed in chunks, so that nothing of width M reaches memory. Backward, from the gradient g of out,
with a recomputed:

    da = act′(a) ⊙ (W₂ᵀ g),   dn = W₁ᵀ da,   dx = g + LN′(dn)
    dW₁ = Σ da nᵀ,   db₁ = Σ da,   dW₂ = Σ g act(a)ᵀ,   db₂ = Σ g,   sums over the rows

LN: with x̂ = (x − mean) / s and n = w ⊙ x̂ + β, dx̂ = w ⊙ dn, dw = Σ x̂ ⊙ dn, dβ = Σ dn. One kernel tiles the rows, one
the hidden units; each program writes partial sums over its rows, which are added in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import block, cdiv, launch, precision, sizes
from .math import dot, standardise, standardise_backward

EPS = tl.constexpr(1e-5)  # torch.nn.functional.layer_norm
CHANNELS = 256  # the widest rows that a program holds

# Rows and hidden units per tile, and warps, by bytes of an element and by kernel, for up to 128 channels. Two programs
# of 16-bit elements share a multiprocessor: one's activations overlap the other's products. mma.sync keeps operands and
# sums in registers: twice the warps avoid spills. Float32 products without TF32 are unrolled and need small tiles.
TILES = {
    2: {"forward": (64, 64, 4), "backward": (64, 32, 4), "weights": (32, 64, 4)},
    (2, 80): {"forward": (64, 64, 8), "backward": (32, 64, 8), "weights": (64, 32, 8)},
    4: {"forward": (32, 32, 8), "backward": (32, 16, 8), "weights": (16, 16, 8)},
}
PROGRAMS = 256  # of the weights kernel: about two for each multiprocessor


@triton.jit
def _gaussian(a):
    """Φ(a), the Gaussian's distribution. Below 0 its base-2 logarithm is nearly a parabola; this polynomial for it has
    an error of 9e-7 in the result and in GELU, and needs no division."""
    z = tl.abs(a)
    power = z * (-1.1510661 + z * (-0.45937163 + z * (-0.052397665 + z * (0.0073105135 - z * 0.00050511486)))) - 1.0
    tail = tl.exp2(power)
    return tl.where(a < 0, tail, 1.0 - tail)


@triton.jit
def _activate(a, GELU: tl.constexpr):
    """act(a)"""
    if GELU:
        return a * _gaussian(a)
    return tl.where(a < 0, 0.0, a)


@triton.jit
def _activate_backward(a, grad, GELU: tl.constexpr):
    """act(a) and grad ⊙ act′(a)"""
    if GELU:
        below = _gaussian(a)
        bell = tl.exp2(a * a * -0.7213475204444817)  # exp(−a² / 2)
        return a * below, grad * (below + a * 0.3989422804014327 * bell)
    return tl.where(a < 0, 0.0, a), tl.where(a <= 0, 0.0, grad)


@triton.jit
def _load_rows(x, row, rows, c, channels):
    mask = (row < rows)[:, None] & (c < channels)[None, :]
    return tl.load(x + row[:, None].to(tl.int64) * channels + c[None, :], mask=mask, other=0.0)


@triton.jit
def _load_weights(fc1_weight, fc2_weight, m, c, hidden, channels):
    """W₁ and W₂ᵀ of the hidden units m, (HIDDEN, CHANNELS) both."""
    mask = (m < hidden)[:, None] & (c < channels)[None, :]
    weight1 = tl.load(fc1_weight + m[:, None] * channels + c[None, :], mask=mask, other=0.0)
    return weight1, tl.load(fc2_weight + c[None, :] * hidden + m[:, None], mask=mask, other=0.0)


@triton.jit
def _load_vector(vector, index, size):
    return tl.load(vector + index, mask=index < size, other=0.0).to(tl.float32)


@triton.jit
def _normalise(x, norm_weight, norm_bias, c, channels):
    """LN(x) of a block of rows, in x's dtype."""
    standardised = standardise(x.to(tl.float32), (c < channels)[None, :], channels, EPS)[0]
    weight = _load_vector(norm_weight, c, channels)
    return (standardised * weight[None, :] + _load_vector(norm_bias, c, channels)[None, :]).to(x.dtype)


@triton.jit
def _mlp(
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, out, rows, channels, hidden,
    ROWS: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr, WHOLE: tl.constexpr, GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)
    dtype = x.dtype.element_ty
    block = _load_rows(x, row, rows, c, channels)
    normed = _normalise(block, norm_weight, norm_bias, c, channels)
    acc = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, hidden, HIDDEN):
        m = start + tl.arange(0, HIDDEN)
        weight1, weight2 = _load_weights(fc1_weight, fc2_weight, m, c, hidden, channels)
        a = dot(normed, tl.trans(weight1), tl.zeros((ROWS, HIDDEN), tl.float32), PRECISION)
        a += _load_vector(fc1_bias, m, hidden)[None, :]
        if not WHOLE:  # an infinite n times the zeros beyond the last hidden unit is NaN
            a = tl.where((m < hidden)[None, :], a, 0.0)
        acc = dot(_activate(a, GELU).to(dtype), weight2, acc, PRECISION)
    acc += _load_vector(fc2_bias, c, channels)[None, :]
    acc += _load_rows(x, row, rows, c, channels).to(tl.float32)
    mask = (row < rows)[:, None] & (c < channels)[None, :]
    tl.store(out + row[:, None].to(tl.int64) * channels + c[None, :], acc, mask=mask)


@triton.jit
def _mlp_backward(
    grad, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, out, sums, rows, channels, hidden,
    ROWS: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr, WHOLE: tl.constexpr, GELU: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of a block of rows, and its part of dw, dβ and db₂: `sums`, (programs, 3, C)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)
    dtype = x.dtype.element_ty
    block = _load_rows(x, row, rows, c, channels)
    normed = _normalise(block, norm_weight, norm_bias, c, channels)
    g = _load_rows(grad, row, rows, c, channels)
    normed_grad = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, hidden, HIDDEN):
        m = start + tl.arange(0, HIDDEN)
        weight1, weight2 = _load_weights(fc1_weight, fc2_weight, m, c, hidden, channels)
        a = dot(normed, tl.trans(weight1), tl.zeros((ROWS, HIDDEN), tl.float32), PRECISION)
        a += _load_vector(fc1_bias, m, hidden)[None, :]
        activated_grad = dot(g, tl.trans(weight2), tl.zeros((ROWS, HIDDEN), tl.float32), PRECISION)
        a_grad = _activate_backward(a, activated_grad, GELU)[1]
        if not WHOLE:
            a_grad = tl.where((m < hidden)[None, :], a_grad, 0.0)
        normed_grad = dot(a_grad.to(dtype), weight1, normed_grad, PRECISION)
    # Rows are reloaded rather than kept through the loop.
    valid = (c < channels)[None, :]
    mask = (row < rows)[:, None] & valid
    block = _load_rows(x, row, rows, c, channels).to(tl.float32)
    standardised, scale = standardise(block, valid, channels, EPS)
    if SUMS:
        part = sums + tl.program_id(0).to(tl.int64) * 3 * channels + c
        tl.store(part, tl.sum(tl.where(mask, normed_grad * standardised, 0.0), 0), mask=c < channels)
        tl.store(part + channels, tl.sum(tl.where(mask, normed_grad, 0.0), 0), mask=c < channels)
    weighted = normed_grad * _load_vector(norm_weight, c, channels)[None, :]
    x_grad = standardise_backward(weighted, standardised, scale, valid, channels)
    grad_rows = _load_rows(grad, row, rows, c, channels).to(tl.float32)
    tl.store(out + row[:, None].to(tl.int64) * channels + c[None, :], x_grad + grad_rows, mask=mask)
    if SUMS:
        tl.store(part + 2 * channels, tl.sum(grad_rows, 0), mask=c < channels)


@triton.jit
def _mlp_backward_weights(
    grad, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc1_part, bias_part, fc2_part,
    rows, channels, hidden, rows_each,
    ROWS: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums over `rows_each` rows of dW₁, db₁, dW₂ᵀ of a chunk of hidden units: (splits, M, C) or (splits, M).
    Hidden units are the rows of all products, so that activations go from one to the next without a transpose."""
    chunks = tl.cdiv(hidden, HIDDEN)
    m = tl.program_id(0) % chunks * HIDDEN + tl.arange(0, HIDDEN)
    split = (tl.program_id(0) // chunks).to(tl.int64)
    c = tl.arange(0, CHANNELS)
    dtype = x.dtype.element_ty
    weight1, weight2 = _load_weights(fc1_weight, fc2_weight, m, c, hidden, channels)
    bias1 = _load_vector(fc1_bias, m, hidden)
    weight1_grad = tl.zeros((HIDDEN, CHANNELS), tl.float32)
    weight2_grad = tl.zeros((HIDDEN, CHANNELS), tl.float32)
    bias1_grad = tl.zeros((HIDDEN,), tl.float32)
    for start in range(0, rows_each, ROWS):
        row = split * rows_each + start + tl.arange(0, ROWS)
        block = _load_rows(x, row, rows, c, channels)
        normed = _normalise(block, norm_weight, norm_bias, c, channels)
        g = _load_rows(grad, row, rows, c, channels)
        a = dot(weight1, tl.trans(normed), tl.zeros((HIDDEN, ROWS), tl.float32), PRECISION) + bias1[:, None]
        activated_grad = dot(weight2, tl.trans(g), tl.zeros((HIDDEN, ROWS), tl.float32), PRECISION)
        activated, a_grad = _activate_backward(a, activated_grad, GELU)
        row_mask = (row < rows)[None, :]  # beyond the last row an infinite weight must not meet a zero
        activated = tl.where(row_mask, activated, 0.0)
        a_grad = tl.where(row_mask, a_grad, 0.0)
        bias1_grad += tl.sum(a_grad, 1)
        weight1_grad = dot(a_grad.to(dtype), normed, weight1_grad, PRECISION)
        weight2_grad = dot(activated.to(dtype), g, weight2_grad, PRECISION)
    mask = (m < hidden)[:, None] & (c < channels)[None, :]
    offset = split * hidden * channels + m[:, None] * channels + c[None, :]
    tl.store(fc1_part + offset, weight1_grad, mask=mask)
    tl.store(fc2_part + offset, weight2_grad, mask=mask)
    tl.store(bias_part + split * hidden + m, bias1_grad, mask=m < hidden)


def _tile(x: Tensor, kernel: str) -> dict[str, int]:
    """Block sizes and warps."""
    channels = block(x.shape[-1], most=CHANNELS)
    rows, hidden, warps = sizes(TILES, x)[kernel]
    if channels > 128:
        rows, hidden = max(rows // 2, 16), max(hidden // 2, 16)
    return {"ROWS": rows, "HIDDEN": hidden, "CHANNELS": channels, "warps": warps}


def residual_mlp(x: Tensor, *weights: Tensor, activation: str) -> Tensor:
    """(..., C) -> the same; weights of norm, W₁, b₁, W₂ and b₂."""
    out = x.new_empty(x.shape)
    hidden, channels = weights[2].shape
    rows = x.numel() // channels
    tile = _tile(x, "forward")
    launch(
        _mlp, (cdiv(rows, tile["ROWS"]),), x, *weights, out, rows, channels, hidden,
        **tile, WHOLE=hidden % tile["HIDDEN"] == 0, GELU=activation == "gelu", PRECISION=precision(),
    )  # fmt: skip
    return out


def residual_mlp_backward(
    grad: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, fc1_weight: Tensor, fc1_bias: Tensor,
    fc2_weight: Tensor, activation: str, need_x: bool, need_sums: bool, need_weights: bool,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of x; of the norm's weight and bias and of b₂ ("sums"); of W₁, b₁ and W₂ ("weights"), in the order of
    the arguments of `residual_mlp`; None if not needed."""
    weights = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight)
    hidden, channels = fc1_weight.shape
    rows = x.numel() // channels
    constants: dict[str, Any] = {"GELU": activation == "gelu", "PRECISION": precision()}
    x_grad = gain = offset = fc1_grad = fc1_bias_grad = fc2_grad = fc2_bias_grad = None
    if need_x or need_sums:
        tile = _tile(x, "backward")
        programs = cdiv(rows, tile["ROWS"])
        x_grad = x.new_empty(x.shape)
        sums = x.new_empty(programs if need_sums else 0, 3, channels, dtype=torch.float32)
        launch(
            _mlp_backward, (programs,), grad, x, *weights, x_grad, sums, rows, channels, hidden,
            **tile, **constants, WHOLE=hidden % tile["HIDDEN"] == 0, SUMS=need_sums,
        )  # fmt: skip
        if need_sums:
            gain, offset, fc2_bias_grad = (part.sum(0).to(x.dtype) for part in sums.unbind(1))
    if need_weights:
        tile = _tile(x, "weights")
        chunks = cdiv(hidden, tile["HIDDEN"])
        splits = min(cdiv(rows, tile["ROWS"]), max(PROGRAMS // max(chunks, 1), 1))
        rows_each = cdiv(cdiv(rows, tile["ROWS"]), max(splits, 1)) * tile["ROWS"]
        fc1_part, fc2_part = (x.new_empty(splits, hidden, channels, dtype=torch.float32) for _ in range(2))
        bias_part = x.new_empty(splits, hidden, dtype=torch.float32)
        launch(
            _mlp_backward_weights, (chunks * splits,), grad, x, *weights, fc1_part, bias_part, fc2_part,
            rows, channels, hidden, rows_each, **tile, **constants,
        )  # fmt: skip
        fc1_grad, fc1_bias_grad = fc1_part.sum(0).to(x.dtype), bias_part.sum(0).to(x.dtype)
        fc2_grad = fc2_part.sum(0).t().to(x.dtype)
    return [x_grad, gain, offset, fc1_grad, fc1_bias_grad, fc2_grad, fc2_bias_grad]
