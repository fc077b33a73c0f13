"""Backward of the window attention in `spatial_aggregation.py`, from the gradient g of y.

With q, k, v recomputed from x, the weights P = softmax(q · kᵀ / √d + mask) and a = P · v of a window's head:

    da = W_oᵀ g;   dv = Pᵀ · da;   dP = da · vᵀ;   dS = P ∘ (dP − rowsum(P ∘ dP)) / √d;   dq = dS · k;   dk = dSᵀ · q
    dn = W_qᵀ dq + W_kᵀ dk + W_vᵀ dv;   dx = g + LN'(dn);   dW_qkv = Σ [dq dk dv]ᵀ n,   dW_o = Σ gᵀ a

dq and dk, summed over the classes, are the gradients of the guidance's share. The products with weights are plain
matrix products; two kernels do the rest: `_attend_backward` and `_norm_backward`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import block, cdiv, launch, precision, sizes
from .common.math import dot, rounded, standardise, standardise_backward
from .spatial_aggregation_windows import EPS, LOG2E, masked, project, slots, window_tiles

# Queries per tile and warps, by bytes of an element.
QUERIES = {2: {"QUERIES": 16, "warps": 4}, 4: {"QUERIES": 16, "warps": 8}}
PROGRAMS = 512  # at most, that share the sums over all tokens; a second step adds up what each found
BLOCK = 4096  # elements of a normalisation tile


@triton.jit
def _attend_backward(
    tokens, grad_attended, grad_tokens, attended, height, width, channels, heads, head_width, size, origin, scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, FULL: tl.constexpr,
    QUERIES: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    NEED_ATTENDED: tl.constexpr,
):  # fmt: skip
    """One head of one window of one class. Blocks of scores are (keys, queries); `origin` is 0, but not known to be."""
    windows = tl.cdiv(height, WINDOW) * tl.cdiv(width, WINDOW)
    head = tl.program_id(0) % heads
    window = tl.program_id(0) // heads % windows
    first = (tl.program_id(0) // heads // windows).to(tl.int64) * height * width
    dtype = tokens.dtype.element_ty
    tokens += first * 3 * channels + head * head_width
    grad_tokens += first * 3 * channels + head * head_width
    attended += first * channels + head * head_width
    grad_attended += first * channels + head * head_width
    d = tl.arange(0, WIDTH)[None, :]
    place, region = slots(0, window, height, width, WINDOW, SHIFT, MAIN)
    at = place[:, None] * (3 * channels) + d
    mask = (region >= 0)[:, None] & (d < head_width)
    k = tl.load(tokens + at + channels, mask=mask, other=0.0)
    v = tl.load(tokens + at + 2 * channels, mask=mask, other=0.0)
    k_grad = tl.zeros((MAIN, WIDTH), tl.float32)
    v_grad = tl.zeros((MAIN, WIDTH), tl.float32)
    if TAIL > 0:
        tail_place, tail_region = slots(MAIN, window, height, width, WINDOW, SHIFT, TAIL)
        tail_at = tail_place[:, None] * (3 * channels) + d
        tail_mask = (tail_region >= 0)[:, None] & (d < head_width)
        tail_k = tl.load(tokens + tail_at + channels, mask=tail_mask, other=0.0)
        tail_v = tl.load(tokens + tail_at + 2 * channels, mask=tail_mask, other=0.0)
        tail_k_grad = tl.zeros((TAIL, WIDTH), tl.float32)
        tail_v_grad = tl.zeros((TAIL, WIDTH), tl.float32)
    for start in range(0, size, QUERIES):
        query, own = slots(start, window, height, width, WINDOW, SHIFT, QUERIES)
        query_mask = (own >= 0)[:, None] & (d < head_width)
        q = tl.load(tokens + query[:, None] * (3 * channels) + d, mask=query_mask, other=0.0)
        g = tl.load(grad_attended + query[:, None] * channels + d, mask=query_mask, other=0.0)
        weights = dot(k, tl.trans(q), tl.zeros((MAIN, QUERIES), tl.float32), PRECISION) * (scale * LOG2E)
        weights = masked(weights, region[:, None], own[None, :], SHIFT, FULL)
        largest = tl.max(weights, 0)
        if TAIL > 0:
            tail = dot(tail_k, tl.trans(q), tl.zeros((TAIL, QUERIES), tl.float32), PRECISION) * (scale * LOG2E)
            tail = masked(tail, tail_region[:, None], own[None, :], SHIFT, FULL)
            largest = tl.maximum(largest, tl.max(tail, 0))
        largest = tl.where(largest == float("-inf"), 0.0, largest)
        weights = tl.exp2(weights - largest[None, :])
        total = tl.sum(weights, 0)
        if TAIL > 0:
            tail = tl.exp2(tail - largest[None, :])
            total += tl.sum(tail, 0)
        total = tl.where(total == 0.0, 1.0, total)
        weights = weights / total[None, :]
        grad = dot(v, tl.trans(g), tl.zeros((MAIN, QUERIES), tl.float32), PRECISION)
        along = tl.sum(weights * grad, 0)
        if TAIL > 0:
            tail = tail / total[None, :]
            tail_grad = dot(tail_v, tl.trans(g), tl.zeros((TAIL, QUERIES), tl.float32), PRECISION)
            along += tl.sum(tail * tail_grad, 0)
        grad = rounded(weights * (grad - along[None, :]) * scale, dtype)
        weights = rounded(weights, dtype)
        v_grad = dot(weights, g, v_grad, PRECISION)
        k_grad = dot(grad, q, k_grad, PRECISION)
        q_grad = dot(tl.trans(grad), k, tl.zeros((QUERIES, WIDTH), tl.float32), PRECISION)
        if TAIL > 0:
            tail_grad = rounded(tail * (tail_grad - along[None, :]) * scale, dtype)
            tail = rounded(tail, dtype)
            tail_v_grad = dot(tail, g, tail_v_grad, PRECISION)
            tail_k_grad = dot(tail_grad, q, tail_k_grad, PRECISION)
            q_grad = dot(tl.trans(tail_grad), tail_k, q_grad, PRECISION)
        tl.store(grad_tokens + query[:, None] * (3 * channels) + d, rounded(q_grad, dtype), mask=query_mask)
        if NEED_ATTENDED:
            values = dot(tl.trans(weights), v, tl.zeros((QUERIES, WIDTH), tl.float32), PRECISION)
            if TAIL > 0:
                values = dot(tl.trans(tail), tail_v, values, PRECISION)
            tl.store(attended + query[:, None] * channels + d, rounded(values, dtype), mask=query_mask)
    # Found again rather than kept in registers all the while.
    place, region = slots(origin, window, height, width, WINDOW, SHIFT, MAIN)
    at = place[:, None] * (3 * channels) + d
    mask = (region >= 0)[:, None] & (d < head_width)
    tl.store(grad_tokens + at + channels, rounded(k_grad, dtype), mask=mask)
    tl.store(grad_tokens + at + 2 * channels, rounded(v_grad, dtype), mask=mask)
    if TAIL > 0:
        tail_place, tail_region = slots(origin + MAIN, window, height, width, WINDOW, SHIFT, TAIL)
        tail_at = tail_place[:, None] * (3 * channels) + d
        tail_mask = (tail_region >= 0)[:, None] & (d < head_width)
        tl.store(grad_tokens + tail_at + channels, rounded(tail_k_grad, dtype), mask=tail_mask)
        tl.store(grad_tokens + tail_at + 2 * channels, rounded(tail_v_grad, dtype), mask=tail_mask)


@triton.jit
def _norm_backward(
    x, grad_normed, grad, norm_weight, norm_bias, x_grad, normed, weight_sums, bias_sums,
    rows, channels, eps, tiles,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, NEED_X: tl.constexpr, NEED_NORMED: tl.constexpr,
    NEED_SUMS: tl.constexpr,
):  # fmt: skip
    """`tiles` tiles of tokens: the residual's and the norm's gradient of x, n, and the sums that are the gradients of
    the norm's weight and bias."""
    dtype = x.dtype.element_ty
    c = tl.arange(0, CHANNELS)[None, :]
    gain = tl.load(norm_weight + c, mask=c < channels, other=0.0).to(tl.float32)
    offset = tl.load(norm_bias + c, mask=c < channels, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((1, CHANNELS), tl.float32)
    bias_sum = tl.zeros((1, CHANNELS), tl.float32)
    for tile in range(tiles):
        row = (tl.program_id(0) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (c < channels)
        at = row[:, None].to(tl.int64) * channels + c
        value, scale = standardise(
            tl.load(x + at, mask=mask, other=0.0).to(tl.float32), c < channels, channels, eps
        )  # fmt: skip
        if NEED_NORMED:
            tl.store(normed + at, rounded(value * gain + offset, dtype), mask=mask)
        if NEED_X or NEED_SUMS:
            inner = tl.load(grad_normed + at, mask=mask, other=0.0).to(tl.float32)
            if NEED_SUMS:
                weight_sum += tl.sum(inner * value, 0, keep_dims=True)
                bias_sum += tl.sum(inner, 0, keep_dims=True)
            if NEED_X:
                inner = standardise_backward(inner * gain, value, scale, c < channels, channels)
                inner += tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
                tl.store(x_grad + at, rounded(inner, dtype), mask=mask)
    if NEED_SUMS:
        at = tl.program_id(0) * channels + c
        tl.store(weight_sums + at, weight_sum, mask=c < channels)
        tl.store(bias_sums + at, bias_sum, mask=c < channels)


def window_attention_backward(
    grad: Tensor, x: Tensor, q_term: Tensor, k_term: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    qkv_weight: Tensor, v_bias: Tensor, heads: int, window: int, shift: int, need_attended: bool,
) -> tuple[Tensor, Tensor, None]:  # fmt: skip
    """Gradients of q, k and v of each token, (rows, 3C), from that of a, (rows, C); a itself if needed; no
    statistics of the norm."""
    batch, classes, height, width, channels = x.shape
    tokens = project(x, q_term, k_term, norm_weight, norm_bias, qkv_weight, v_bias)
    tokens_grad = torch.empty_like(tokens)
    attended = torch.empty_like(grad) if need_attended else x.new_empty(0)
    queries = dict(sizes(QUERIES, x))
    warps = queries.pop("warps")
    launch(
        _attend_backward, (batch * classes * cdiv(height, window) * cdiv(width, window) * heads,),
        tokens, grad, tokens_grad, attended, height, width, channels, heads,
        channels // heads, window**2, 0, (channels // heads) ** -0.5,
        **window_tiles(height, width, window, shift), **queries,
        WIDTH=block(channels // heads, most=1 << 16), PRECISION=precision(),
        NEED_ATTENDED=need_attended, warps=warps, stages=1,
    )  # fmt: skip
    return tokens_grad, attended, None


def norm_backward(
    normed_grad: Tensor, grad: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, _: None,
    needs: list[bool], need_normed: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of x, with the residual's, and of the norm's weight and bias; n, (rows, C)."""
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
        x, normed_grad, grad, norm_weight, norm_bias, x_grad, normed, weight_sums, bias_sums,
        rows, channels, EPS, tiles,
        ROWS=tile, CHANNELS=wide, NEED_X=need_x, NEED_NORMED=need_normed, NEED_SUMS=need_sums,
    )  # fmt: skip
    gain, offset = (sums.sum(0).to(x.dtype) if need_sums else None for sums in (weight_sums, bias_sums))
    return x_grad, gain, offset, normed
