"""Spatial aggregation: one guided shifted-window block; the MLP that ends it is in `common/residual_mlp.py`.

    n = LN(x);   q = W_q n + q_g,   k = W_k n + k_g,   v = W_v n + b_v          (q_g, k_g: the guidance's terms)
    a = softmax(q · kᵀ / √d + mask) · v,  within each window and head;     y = x + W_o a + b_o

Three kernels: `_project` normalises x and gives q, k and v of each token; `_attend` reads a window's tokens from the
map, so that nothing is rolled or partitioned; `_output` projects and adds the residual.

A window of n = window² tokens is a tile of the largest power of two up to n and a second one for the rest: the
published 144 are 128 + 16; one of 256 would waste 44 %. Slots beyond the map score −∞ and are never written; pairs that
only the shift brought together get −100, as published. If all scores are −∞, a token attends to nothing, as in PyTorch.
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
    row_offset = row[:, None].to(tl.int64) * channels
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, channels, CHANNELS):
        i = start + tl.arange(0, CHANNELS)
        a = tl.load(attended + row_offset + i, mask=(row < rows)[:, None] & (i < channels), other=0.0)
        w = tl.load(weight + c[:, None] * channels + i, mask=(c < channels)[:, None] & (i < channels), other=0.0)
        acc = dot(a, tl.trans(w), acc, PRECISION)
    mask = (row < rows)[:, None] & (c < channels)
    acc += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    acc += tl.load(x + row_offset + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row_offset + c, rounded(acc, out.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    tokens, attended, height, width, channels, heads, head_width, size, scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, FULL: tl.constexpr,
    QUERIES: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head of one window of one class. `head_width` is an argument, so that loads are as wide as it allows."""
    windows = tl.cdiv(height, WINDOW) * tl.cdiv(width, WINDOW)
    head = tl.program_id(0) % heads
    window = tl.program_id(0) // heads % windows
    map_offset = (tl.program_id(0) // heads // windows).to(tl.int64) * height * width
    dtype = tokens.dtype.element_ty
    tokens += map_offset * 3 * channels + head * head_width
    attended += map_offset * channels + head * head_width
    d = tl.arange(0, WIDTH)[None, :]
    position, region = slots(0, window, height, width, WINDOW, SHIFT, MAIN)
    key_pointers = tokens + position[:, None] * (3 * channels) + d
    k = tl.load(key_pointers + channels, mask=(region >= 0)[:, None] & (d < head_width), other=0.0)
    v = tl.load(key_pointers + 2 * channels, mask=(region >= 0)[:, None] & (d < head_width), other=0.0)
    if TAIL > 0:
        tail_position, tail_region = slots(MAIN, window, height, width, WINDOW, SHIFT, TAIL)
        key_pointers = tokens + tail_position[:, None] * (3 * channels) + d
        tail_k = tl.load(key_pointers + channels, mask=(tail_region >= 0)[:, None] & (d < head_width), other=0.0)
        tail_v = tl.load(key_pointers + 2 * channels, mask=(tail_region >= 0)[:, None] & (d < head_width), other=0.0)
    for start in range(0, size, QUERIES):
        query, query_region = slots(start, window, height, width, WINDOW, SHIFT, QUERIES)
        query_mask = (query_region >= 0)[:, None] & (d < head_width)
        q = tl.load(tokens + query[:, None] * (3 * channels) + d, mask=query_mask, other=0.0)
        scores = dot(q, tl.trans(k), tl.zeros((QUERIES, MAIN), tl.float32), PRECISION) * (scale * LOG2E)
        scores = masked(scores, region[None, :], query_region[:, None], SHIFT, FULL)
        row_max = tl.max(scores, 1)
        if TAIL > 0:
            tail = dot(q, tl.trans(tail_k), tl.zeros((QUERIES, TAIL), tl.float32), PRECISION) * (scale * LOG2E)
            tail = masked(tail, tail_region[None, :], query_region[:, None], SHIFT, FULL)
            row_max = tl.maximum(row_max, tl.max(tail, 1))
        row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
        weights = tl.exp2(scores - row_max[:, None])
        row_sum = tl.sum(weights, 1)
        acc = dot(rounded(weights, dtype), v, tl.zeros((QUERIES, WIDTH), tl.float32), PRECISION)
        if TAIL > 0:
            tail = tl.exp2(tail - row_max[:, None])
            row_sum += tl.sum(tail, 1)
            acc = dot(rounded(tail, dtype), tail_v, acc, PRECISION)
        acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
        tl.store(attended + query[:, None] * channels + d, rounded(acc, dtype), mask=query_mask)


def spatial_aggregation(x: Tensor, q_term: Tensor, k_term: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """(B, T, H, W, C) -> the same, and y, empty unless `keep`; terms (B, H · W, C). `others`: the norm's weights, those
    of q, k and v (3C, C), v's bias, weights of the projection (C, C) and of the MLP, heads, window, shift, keep."""
    *qkv, proj_weight, proj_bias = others[:6]
    *mlp, heads, window, shift, keep = others[6:]
    batch, classes, height, width, channels = x.shape
    rows = batch * classes * height * width
    tokens = project(x, q_term, k_term, *qkv)
    attended = x.new_empty(rows, channels)
    launch(
        _attend, (batch * classes * cdiv(height, window) * cdiv(width, window) * heads,),
        tokens, attended, height, width, channels, heads, channels // heads, window**2, (channels // heads) ** -0.5,
        **window_tiles(height, width, window, shift), **sizes(QUERIES, x), PRECISION=precision(),
        WIDTH=block(channels // heads, most=1 << 16), stages=1,
    )  # fmt: skip
    middle = torch.empty_like(x)
    tile = projection_tile(x)
    launch(
        _output, (cdiv(rows, tile["ROWS"]) * cdiv(channels, tile["COLUMNS"]),),
        x, attended, proj_weight, proj_bias, middle, rows, channels, **tile, PRECISION=precision(),
    )  # fmt: skip
    return residual_mlp(middle, *mlp, activation="gelu"), middle if keep else x.new_empty(0)
