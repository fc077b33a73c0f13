"""Backward of the attention half of `spatial_aggregation.py`, from the gradient g of y.

With q, k, v recomputed from x, the probabilities P = softmax(q · kᵀ / √d + mask) and a = P · v of a window's head:

    da = W_oᵀ g;   dv = Pᵀ · da;   dP = da · vᵀ;   dS = P ∘ (dP − rowsum(P ∘ dP)) / √d;   dq = dS · k;   dk = dSᵀ · q
    dn = W_qᵀ dq + W_kᵀ dk + W_vᵀ dv;   dx = g + LN'(dn);   dW_qkv = Σ [dq dk dv]ᵀ n,   dW_o = Σ gᵀ a

dq and dk, summed over the classes, are the gradients of the guidance's terms. PyTorch takes products with weights.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import block, cdiv, launch, precision, sizes
from .common.math import dot, rounded, standardise, standardise_backward
from .spatial_aggregation_windows import EPS, LOG2E, masked, project, slots, window_tiles

# Queries per tile and warps, by bytes of an element.
QUERIES = {2: {"QUERIES": 16, "warps": 4}, 4: {"QUERIES": 16, "warps": 8}}
PROGRAMS = 512  # at most, of partial sums over all tokens
BLOCK = 4096  # elements of a normalisation tile


@triton.jit
def _attend_backward(
    tokens, grad_attended, grad_tokens, attended, height, width, channels, heads, head_width, size, origin, scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, FULL: tl.constexpr,
    QUERIES: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, NEED_ATTENDED: tl.constexpr,
):  # fmt: skip
    """One head of one window of one class. Blocks of scores are (keys, queries); `origin` is 0, but not known to be."""
    windows = tl.cdiv(height, WINDOW) * tl.cdiv(width, WINDOW)
    head = tl.program_id(0) % heads
    window = tl.program_id(0) // heads % windows
    map_offset = (tl.program_id(0) // heads // windows).to(tl.int64) * height * width
    dtype = tokens.dtype.element_ty
    tokens += map_offset * 3 * channels + head * head_width
    grad_tokens += map_offset * 3 * channels + head * head_width
    attended += map_offset * channels + head * head_width
    grad_attended += map_offset * channels + head * head_width
    d = tl.arange(0, WIDTH)[None, :]
    position, region = slots(0, window, height, width, WINDOW, SHIFT, MAIN)
    offset = position[:, None] * (3 * channels) + d
    mask = (region >= 0)[:, None] & (d < head_width)
    k = tl.load(tokens + offset + channels, mask=mask, other=0.0)
    v = tl.load(tokens + offset + 2 * channels, mask=mask, other=0.0)
    k_grad = tl.zeros((MAIN, WIDTH), tl.float32)
    v_grad = tl.zeros((MAIN, WIDTH), tl.float32)
    if TAIL > 0:
        tail_position, tail_region = slots(MAIN, window, height, width, WINDOW, SHIFT, TAIL)
        tail_offset = tail_position[:, None] * (3 * channels) + d
        tail_mask = (tail_region >= 0)[:, None] & (d < head_width)
        tail_k = tl.load(tokens + tail_offset + channels, mask=tail_mask, other=0.0)
        tail_v = tl.load(tokens + tail_offset + 2 * channels, mask=tail_mask, other=0.0)
        tail_k_grad = tl.zeros((TAIL, WIDTH), tl.float32)
        tail_v_grad = tl.zeros((TAIL, WIDTH), tl.float32)
    for start in range(0, size, QUERIES):
        query, query_region = slots(start, window, height, width, WINDOW, SHIFT, QUERIES)
        query_mask = (query_region >= 0)[:, None] & (d < head_width)
        q = tl.load(tokens + query[:, None] * (3 * channels) + d, mask=query_mask, other=0.0)
        g = tl.load(grad_attended + query[:, None] * channels + d, mask=query_mask, other=0.0)
        p = dot(k, tl.trans(q), tl.zeros((MAIN, QUERIES), tl.float32), PRECISION) * (scale * LOG2E)
        p = masked(p, region[:, None], query_region[None, :], SHIFT, FULL)
        col_max = tl.max(p, 0)
        if TAIL > 0:
            tail_p = dot(tail_k, tl.trans(q), tl.zeros((TAIL, QUERIES), tl.float32), PRECISION) * (scale * LOG2E)
            tail_p = masked(tail_p, tail_region[:, None], query_region[None, :], SHIFT, FULL)
            col_max = tl.maximum(col_max, tl.max(tail_p, 0))
        col_max = tl.where(col_max == float("-inf"), 0.0, col_max)
        p = tl.exp2(p - col_max[None, :])
        col_sum = tl.sum(p, 0)
        if TAIL > 0:
            tail_p = tl.exp2(tail_p - col_max[None, :])
            col_sum += tl.sum(tail_p, 0)
        col_sum = tl.where(col_sum == 0.0, 1.0, col_sum)
        p = p / col_sum[None, :]
        ds = dot(v, tl.trans(g), tl.zeros((MAIN, QUERIES), tl.float32), PRECISION)
        delta = tl.sum(p * ds, 0)
        if TAIL > 0:
            tail_p = tail_p / col_sum[None, :]
            tail_ds = dot(tail_v, tl.trans(g), tl.zeros((TAIL, QUERIES), tl.float32), PRECISION)
            delta += tl.sum(tail_p * tail_ds, 0)
        ds = rounded(p * (ds - delta[None, :]) * scale, dtype)
        p = rounded(p, dtype)
        v_grad = dot(p, g, v_grad, PRECISION)
        k_grad = dot(ds, q, k_grad, PRECISION)
        q_grad = dot(tl.trans(ds), k, tl.zeros((QUERIES, WIDTH), tl.float32), PRECISION)
        if TAIL > 0:
            tail_ds = rounded(tail_p * (tail_ds - delta[None, :]) * scale, dtype)
            tail_p = rounded(tail_p, dtype)
            tail_v_grad = dot(tail_p, g, tail_v_grad, PRECISION)
            tail_k_grad = dot(tail_ds, q, tail_k_grad, PRECISION)
            q_grad = dot(tl.trans(tail_ds), tail_k, q_grad, PRECISION)
        tl.store(grad_tokens + query[:, None] * (3 * channels) + d, rounded(q_grad, dtype), mask=query_mask)
        if NEED_ATTENDED:
            values = dot(tl.trans(p), v, tl.zeros((QUERIES, WIDTH), tl.float32), PRECISION)
            if TAIL > 0:
                values = dot(tl.trans(tail_p), tail_v, values, PRECISION)
            tl.store(attended + query[:, None] * channels + d, rounded(values, dtype), mask=query_mask)
    # Recomputed, which takes fewer registers than keeping them.
    position, region = slots(origin, window, height, width, WINDOW, SHIFT, MAIN)
    offset = position[:, None] * (3 * channels) + d
    mask = (region >= 0)[:, None] & (d < head_width)
    tl.store(grad_tokens + offset + channels, rounded(k_grad, dtype), mask=mask)
    tl.store(grad_tokens + offset + 2 * channels, rounded(v_grad, dtype), mask=mask)
    if TAIL > 0:
        tail_position, tail_region = slots(origin + MAIN, window, height, width, WINDOW, SHIFT, TAIL)
        tail_offset = tail_position[:, None] * (3 * channels) + d
        tail_mask = (tail_region >= 0)[:, None] & (d < head_width)
        tl.store(grad_tokens + tail_offset + channels, rounded(tail_k_grad, dtype), mask=tail_mask)
        tl.store(grad_tokens + tail_offset + 2 * channels, rounded(tail_v_grad, dtype), mask=tail_mask)


@triton.jit
def _norm_backward(
    x, grad_normed, grad, norm_weight, norm_bias, x_grad, normed, weight_sums, bias_sums, rows, channels, eps, tiles,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, NEED_X: tl.constexpr, NEED_NORMED: tl.constexpr,
    NEED_SUMS: tl.constexpr,
):  # fmt: skip
    """`tiles` tiles of tokens: dx, n, and partial sums of the gradients of the norm's weight and bias."""
    dtype = x.dtype.element_ty
    c = tl.arange(0, CHANNELS)[None, :]
    weight = tl.load(norm_weight + c, mask=c < channels, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias + c, mask=c < channels, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((1, CHANNELS), tl.float32)
    bias_sum = tl.zeros((1, CHANNELS), tl.float32)
    for tile in range(tiles):
        row = (tl.program_id(0) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (c < channels)
        offset = row[:, None].to(tl.int64) * channels + c
        value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
        value, scale = standardise(value, c < channels, channels, eps)
        if NEED_NORMED:
            tl.store(normed + offset, rounded(value * weight + bias, dtype), mask=mask)
        if NEED_X or NEED_SUMS:
            acc = tl.load(grad_normed + offset, mask=mask, other=0.0).to(tl.float32)
            if NEED_SUMS:
                weight_sum += tl.sum(acc * value, 0, keep_dims=True)
                bias_sum += tl.sum(acc, 0, keep_dims=True)
            if NEED_X:
                acc = standardise_backward(acc * weight, value, scale, c < channels, channels)
                acc += tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
                tl.store(x_grad + offset, rounded(acc, dtype), mask=mask)
    if NEED_SUMS:
        offset = tl.program_id(0) * channels + c
        tl.store(weight_sums + offset, weight_sum, mask=c < channels)
        tl.store(bias_sums + offset, bias_sum, mask=c < channels)


def window_attention_backward(grad: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor, None]:
    """From da, (rows, C): (dq, dk, dv) of each token, (rows, 3C); a, if needed; no statistics of the norm. `others`:
    what `project` takes with x, heads, window, shift, and whether a is needed."""
    *terms_and_weights, heads, window, shift, need_attended = others
    batch, classes, height, width, channels = x.shape
    tokens = project(x, *terms_and_weights)
    tokens_grad = torch.empty_like(tokens)
    attended = torch.empty_like(grad) if need_attended else x.new_empty(0)
    launch(
        _attend_backward, (batch * classes * cdiv(height, window) * cdiv(width, window) * heads,),
        tokens, grad, tokens_grad, attended, height, width, channels, heads, channels // heads, window**2, 0,
        (channels // heads) ** -0.5, **window_tiles(height, width, window, shift), **sizes(QUERIES, x),
        WIDTH=block(channels // heads, most=1 << 16), PRECISION=precision(), NEED_ATTENDED=need_attended, stages=1,
    )  # fmt: skip
    return tokens_grad, attended, None


def norm_backward(
    normed_grad: Tensor, grad: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, _: None,
    needs: list[bool], need_normed: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """dx, the gradients of the norm's weight and bias, and n, (rows, C), from dn and g."""
    channels = x.shape[-1]
    rows = x.numel() // channels
    need_x, need_gain, need_offset = needs
    need_sums = need_gain or need_offset
    x_grad = torch.empty_like(x) if need_x else x.new_empty(0)
    normed = x.new_empty(rows if need_normed else 0, channels)
    wide = block(channels, most=1 << 16)
    tile = max(BLOCK // wide, 1)
    tiles = cdiv(cdiv(rows, tile), PROGRAMS)
    programs = cdiv(cdiv(rows, tile), max(tiles, 1))
    weight_sums, bias_sums = (x.new_empty(programs * need_sums, channels, dtype=torch.float32) for _ in range(2))
    launch(
        _norm_backward, (programs,),
        x, normed_grad, grad, norm_weight, norm_bias, x_grad, normed, weight_sums, bias_sums, rows, channels, EPS,
        tiles, ROWS=tile, CHANNELS=wide, NEED_X=need_x, NEED_NORMED=need_normed, NEED_SUMS=need_sums,
    )  # fmt: skip
    gain, offset = (sums.sum(0).to(x.dtype) if need_sums else None for sums in (weight_sums, bias_sums))
    return x_grad, gain, offset, normed
