"""Spatial aggregation: the attention half of one guided shifted-window block.

    n = LN(x);   q = W_q n + q_g,   k = W_k n + k_g,   v = W_v n + b_v          (q_g, k_g: the guidance's share)
    a = softmax(q · kᵀ / √d + mask) · v,  within each window and head;     y = x + W_o a + b_o

Three kernels: `_project` normalises x and gives q, k and v of each token; `_attend` finds the tokens of a window where
they lie on the map, so that nothing is rolled or cut into windows; `_output` projects and adds the residual.

A window of n = window² tokens is held as a tile of the largest power of two up to n and a second one for the rest: the
published 144 are 128 + 16, where one power of two would waste 44 %. Slots beyond the map count −∞ and are never
written; pairs of tokens that only the shift brought together get −100 added, as published. Where all scores of a token
are −∞ it attends to nothing, as in PyTorch.

The backward pass is in `_spatial_aggregation_backward.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import block, cdiv, launch, precision, sizes
from .common.math import dot, rounded
from .common.residual_mlp import residual_mlp, residual_mlp_backward
from .spatial_aggregation_backward import norm_backward, window_attention_backward
from .spatial_aggregation_windows import LOG2E, masked, project, projection_tile, slots, window_tiles

__all__ = ["norm_backward", "residual_mlp_backward", "spatial_aggregation", "window_attention_backward"]

# Queries per tile and warps, by bytes of an element.
QUERIES = {2: {"QUERIES": 32, "warps": 2}, 4: {"QUERIES": 16, "warps": 8}}


@triton.jit
def _output(
    x, attended, weight, bias, out, rows, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(channels, COLUMNS)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    line = row[:, None].to(tl.int64) * channels
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, channels, CHANNELS):
        i = start + tl.arange(0, CHANNELS)
        a = tl.load(attended + line + i, mask=(row < rows)[:, None] & (i < channels), other=0.0)
        w = tl.load(weight + c[:, None] * channels + i, mask=(c < channels)[:, None] & (i < channels), other=0.0)
        product = dot(a, tl.trans(w), product, PRECISION)
    mask = (row < rows)[:, None] & (c < channels)
    product += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    product += tl.load(x + line + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + line + c, rounded(product, out.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    tokens, attended, height, width, channels, heads, head_width, size, scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, FULL: tl.constexpr,
    QUERIES: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head of one window of one class. `head_width` is an argument: what divides it decides how much is read at
    once."""
    windows = tl.cdiv(height, WINDOW) * tl.cdiv(width, WINDOW)
    head = tl.program_id(0) % heads
    window = tl.program_id(0) // heads % windows
    first = (tl.program_id(0) // heads // windows).to(tl.int64) * height * width
    dtype = tokens.dtype.element_ty
    tokens += first * 3 * channels + head * head_width
    attended += first * channels + head * head_width
    d = tl.arange(0, WIDTH)[None, :]
    place, region = slots(0, window, height, width, WINDOW, SHIFT, MAIN)
    at = tokens + place[:, None] * (3 * channels) + d
    k = tl.load(at + channels, mask=(region >= 0)[:, None] & (d < head_width), other=0.0)
    v = tl.load(at + 2 * channels, mask=(region >= 0)[:, None] & (d < head_width), other=0.0)
    if TAIL > 0:
        tail_place, tail_region = slots(MAIN, window, height, width, WINDOW, SHIFT, TAIL)
        at = tokens + tail_place[:, None] * (3 * channels) + d
        tail_k = tl.load(at + channels, mask=(tail_region >= 0)[:, None] & (d < head_width), other=0.0)
        tail_v = tl.load(at + 2 * channels, mask=(tail_region >= 0)[:, None] & (d < head_width), other=0.0)
    for start in range(0, size, QUERIES):
        query, own = slots(start, window, height, width, WINDOW, SHIFT, QUERIES)
        query_mask = (own >= 0)[:, None] & (d < head_width)
        q = tl.load(tokens + query[:, None] * (3 * channels) + d, mask=query_mask, other=0.0)
        scores = dot(q, tl.trans(k), tl.zeros((QUERIES, MAIN), tl.float32), PRECISION) * (scale * LOG2E)
        scores = masked(scores, region[None, :], own[:, None], SHIFT, FULL)
        largest = tl.max(scores, 1)
        if TAIL > 0:
            tail = dot(q, tl.trans(tail_k), tl.zeros((QUERIES, TAIL), tl.float32), PRECISION) * (scale * LOG2E)
            tail = masked(tail, tail_region[None, :], own[:, None], SHIFT, FULL)
            largest = tl.maximum(largest, tl.max(tail, 1))
        largest = tl.where(largest == float("-inf"), 0.0, largest)
        weights = tl.exp2(scores - largest[:, None])
        total = tl.sum(weights, 1)
        values = dot(rounded(weights, dtype), v, tl.zeros((QUERIES, WIDTH), tl.float32), PRECISION)
        if TAIL > 0:
            tail = tl.exp2(tail - largest[:, None])
            total += tl.sum(tail, 1)
            values = dot(rounded(tail, dtype), tail_v, values, PRECISION)
        values = values / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(attended + query[:, None] * channels + d, rounded(values, dtype), mask=query_mask)


def spatial_aggregation(
    x: Tensor, q_term: Tensor, k_term: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor,
    v_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, *others: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(B, T, H, W, C) -> the same, and what the attention half gives, if it is kept; terms (B, H · W, C), qkv_weight
    (3C, C), proj_weight (C, C); `others` are the MLP's weights, heads, window, shift and whether to keep."""
    *mlp, heads, window, shift, keep = others
    batch, classes, height, width, channels = x.shape
    rows = batch * classes * height * width
    tokens = project(x, q_term, k_term, norm_weight, norm_bias, qkv_weight, v_bias)
    attended = x.new_empty(rows, channels)
    queries = dict(sizes(QUERIES, x))
    warps = queries.pop("warps")
    launch(
        _attend, (batch * classes * cdiv(height, window) * cdiv(width, window) * heads,),
        tokens, attended, height, width, channels, heads, channels // heads, window**2, (channels // heads) ** -0.5,
        **window_tiles(height, width, window, shift), **queries, WIDTH=block(channels // heads, most=1 << 16),
        PRECISION=precision(), warps=warps, stages=1,
    )  # fmt: skip
    middle = torch.empty_like(x)
    tile, warps = projection_tile(x)
    launch(
        _output, (cdiv(rows, tile["ROWS"]) * cdiv(channels, tile["COLUMNS"]),),
        x, attended, proj_weight, proj_bias, middle, rows, channels, **tile, PRECISION=precision(), warps=warps,
    )  # fmt: skip
    out = residual_mlp(middle, *mlp, activation="gelu")
    return out, middle if keep else x.new_empty(0)
