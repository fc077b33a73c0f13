"""Class aggregation's full attention over the classes of a position, from projected tokens.

With q', k', v' the weights' products with n, without guidance and biases, at each position and head of d channels:

    q_t = q'_t + g_t,   k_t = k'_t + h_t,   v_t = v'_t + b
    s_tu = q_t · k_u / √d,   and log(pads) more where u is the padding class
    p_tu = exp(s_tu) / Σ_u exp(s_tu),   a_t = Σ_u p_tu v_u,   y_t = average-pool(x)_t + a_t

The padding classes are all alike: one key. Backward, from the gradient g_t of y_t:

    ds_tu = p_tu (g_t · v_u − g_t · a_t)
    dq_t = Σ_u ds_tu k_u / √d,   dk_u = Σ_t ds_tu q_t / √d,   dv_u = Σ_t p_tu g_t

One kernel computes y or dq, another, with the logarithms of the sums and g_t · a_t, dk and dv.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .class_aggregation_tokens import pooled
from .common.launch import block, cdiv, launch, precision, sizes
from .common.math import dot, rounded

# Classes per tile and warps, by bytes of an element. Float32 products without TF32 are unrolled, which takes registers.
TILES = {2: {"TOKENS": 64, "warps": 4}, 4: {"TOKENS": 32, "warps": 8}}


@triton.jit
def _part(projected, row, terms, t, inside, c, channels, PART: tl.constexpr):
    """q, k or v (PART 0, 1, 2) of one tile, in the tensors' dtype; `terms` is v's bias for v."""
    value = tl.load(projected + row[:, None] * (3 * channels) + PART * channels + c[None, :], mask=inside, other=0.0)
    value = value.to(tl.float32)
    if PART == 2:
        value += tl.load(terms + c[None, :] + t[:, None] * 0, mask=inside, other=0.0).to(tl.float32)
    else:
        place = t[:, None] * (2 * channels) + PART * channels + c[None, :]
        value += tl.load(terms + place, mask=inside, other=0.0).to(tl.float32)
    return rounded(value, projected.dtype.element_ty)


@triton.jit
def _scores(q, k, u, classes, keys, scale, log_pads, TOKENS: tl.constexpr, PRECISION: tl.constexpr):
    """s of one tile of queries and one of keys; −∞ beyond the last key."""
    s = dot(q, tl.trans(k), tl.zeros((TOKENS, TOKENS), tl.float32), PRECISION) * scale
    s += tl.where(u < classes, 0.0, log_pads)[None, :]
    return tl.where((u < keys)[None, :], s, float("-inf"))


@triton.jit
def _queries(
    projected, terms, v_bias, x, grad, out, log_sums, deltas,
    classes, keys, positions, channels, heads, head_channels, terms_stride, padding_row, scale, log_pads, height, width,
    pooling, TOKENS: tl.constexpr, HEAD: tl.constexpr, PRECISION: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """One position, head and tile of classes. Writes y; backward, dq', the logarithm of each class's sum, and g · a."""
    dtype = projected.dtype.element_ty
    tiles = tl.cdiv(classes, TOKENS)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    position = (tl.program_id(0) // tiles // heads).to(tl.int64)
    first_row = position // positions * classes * positions + position % positions
    terms += position // positions * terms_stride
    c = head * head_channels + tl.arange(0, HEAD)
    valid = (tl.arange(0, HEAD) < head_channels)[None, :]
    t = tile * TOKENS + tl.arange(0, TOKENS)
    row = first_row + t.to(tl.int64) * positions
    mask = (t < classes)[:, None] & valid
    q = _part(projected, row, terms, t, mask, c, channels, 0)

    row_max = tl.full((TOKENS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((TOKENS,), tl.float32)
    acc = tl.zeros((TOKENS, HEAD), tl.float32)
    for start in range(0, keys, TOKENS):
        u = start + tl.arange(0, TOKENS)
        key_row = tl.where(u < classes, first_row + u.to(tl.int64) * positions, padding_row)
        key_mask = (u < keys)[:, None] & valid
        k = _part(projected, key_row, terms, u, key_mask, c, channels, 1)
        v = _part(projected, key_row, v_bias, u, key_mask, c, channels, 2)
        s = _scores(q, k, u, classes, keys, scale, log_pads, TOKENS, PRECISION)
        previous_max = row_max
        row_max = tl.maximum(row_max, tl.max(s, 1))
        p = tl.exp(s - row_max[:, None])
        rescale = tl.exp(previous_max - row_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = dot(rounded(p, dtype), v, acc * rescale[:, None], PRECISION)
    acc = acc / row_sum[:, None]

    offset = row[:, None] * channels + c[None, :]
    if BACKWARD:
        g = tl.load(grad + offset, mask=mask, other=0.0)
        delta = tl.sum(tl.where(mask, acc, 0.0) * g.to(tl.float32), 1)
        log_sum = row_max + tl.log(row_sum)
        stat_offset = (position * heads + head) * classes + t
        tl.store(deltas + stat_offset, delta, mask=t < classes)
        tl.store(log_sums + stat_offset, log_sum, mask=t < classes)
        dq = tl.zeros((TOKENS, HEAD), tl.float32)
        for start in range(0, keys, TOKENS):
            u = start + tl.arange(0, TOKENS)
            key_row = tl.where(u < classes, first_row + u.to(tl.int64) * positions, padding_row)
            key_mask = (u < keys)[:, None] & valid
            k = _part(projected, key_row, terms, u, key_mask, c, channels, 1)
            v = _part(projected, key_row, v_bias, u, key_mask, c, channels, 2)
            s = _scores(q, k, u, classes, keys, scale, log_pads, TOKENS, PRECISION)
            p = tl.exp(s - log_sum[:, None])
            ds = dot(g, tl.trans(v), tl.zeros((TOKENS, TOKENS), tl.float32), PRECISION) - delta[:, None]
            dq = dot(rounded(p * ds * scale, dtype), k, dq, PRECISION)
        tl.store(out + row[:, None] * (3 * channels) + c[None, :], rounded(dq, dtype), mask=mask)
    else:
        y = pooled(x, row, c, mask, height, width, channels, pooling) + acc
        tl.store(out + offset, rounded(y, dtype), mask=mask)


@triton.jit
def _keys(
    projected, terms, v_bias, grad, out, pad_out, log_sums, deltas,
    classes, keys, positions, channels, heads, head_channels, terms_stride, padding_row, scale, log_pads,
    TOKENS: tl.constexpr, HEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk' and dv of one position, head and tile of keys; of the padding class in pad_out."""
    dtype = projected.dtype.element_ty
    tiles = tl.cdiv(keys, TOKENS)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    position = (tl.program_id(0) // tiles // heads).to(tl.int64)
    first_row = position // positions * classes * positions + position % positions
    terms += position // positions * terms_stride
    c = head * head_channels + tl.arange(0, HEAD)
    valid = (tl.arange(0, HEAD) < head_channels)[None, :]
    u = tile * TOKENS + tl.arange(0, TOKENS)
    key_row = tl.where(u < classes, first_row + u.to(tl.int64) * positions, padding_row)
    key_mask = (u < keys)[:, None] & valid
    k = _part(projected, key_row, terms, u, key_mask, c, channels, 1)
    v = _part(projected, key_row, v_bias, u, key_mask, c, channels, 2)

    dk = tl.zeros((TOKENS, HEAD), tl.float32)
    dv = tl.zeros((TOKENS, HEAD), tl.float32)
    for start in range(0, classes, TOKENS):
        t = start + tl.arange(0, TOKENS)
        row = first_row + t.to(tl.int64) * positions
        mask = (t < classes)[:, None] & valid
        q = _part(projected, row, terms, t, mask, c, channels, 0)
        g = tl.load(grad + row[:, None] * channels + c[None, :], mask=mask, other=0.0)
        stat_offset = (position * heads + head) * classes + t
        log_sum = tl.load(log_sums + stat_offset, mask=t < classes, other=float("inf"))
        delta = tl.load(deltas + stat_offset, mask=t < classes, other=0.0)
        p = tl.exp(_scores(q, k, u, classes, keys, scale, log_pads, TOKENS, PRECISION) - log_sum[:, None])
        dv = dot(tl.trans(rounded(p, dtype)), g, dv, PRECISION)
        ds = dot(g, tl.trans(v), tl.zeros((TOKENS, TOKENS), tl.float32), PRECISION) - delta[:, None]
        dk = dot(tl.trans(rounded(p * ds * scale, dtype)), q, dk, PRECISION)
    pointers = out + key_row[:, None] * (3 * channels) + channels + c[None, :]
    mask = (u < classes)[:, None] & valid
    tl.store(pointers, rounded(dk, dtype), mask=mask)
    tl.store(pointers + channels, rounded(dv, dtype), mask=mask)
    pointers = pad_out + position * (2 * channels) + c[None, :] + u[:, None] * 0
    mask = key_mask & (u >= classes)[:, None]
    tl.store(pointers, dk, mask=mask)
    tl.store(pointers + channels, dv, mask=mask)


def attend(
    projected: Tensor, x: Tensor, terms: Tensor, v_bias: Tensor, grad: Tensor, out: Tensor, pad_out: Tensor,
    pads: int, heads: int, pooling: int, backward: bool,
) -> None:  # fmt: skip
    """Writes y, (B, T, h, w, C), from projected (tokens and the padding class, 3C) and x, (B, T, H, W, C). Backward:
    (dq', dk', dv) of the tokens, (tokens, 3C), and (dk', dv) of the padding class at each position."""
    batch, classes, height, width, channels = x.shape
    positions = (height // pooling) * (width // pooling)
    keys, lines = classes + (pads > 0), batch * positions * heads
    numbers = (
        classes, keys, positions, channels, heads, channels // heads, terms.stride(0) if len(terms) > 1 else 0,
        batch * classes * positions, (channels // heads) ** -0.5, math.log(max(pads, 1)),
    )  # fmt: skip
    tile = sizes(TILES, x)
    tokens = block(keys, 16, tile["TOKENS"])
    tile = tile | {"TOKENS": tokens, "HEAD": block(channels // heads, 16), "PRECISION": precision()}
    log_sums = deltas = out
    if backward:
        log_sums, deltas = (x.new_empty(lines * classes, dtype=torch.float32) for _ in range(2))
    launch(
        _queries, (lines * cdiv(classes, tokens),), projected, terms, v_bias, x, grad, out, log_sums, deltas,
        *numbers, height, width, pooling, **tile, BACKWARD=backward,
    )  # fmt: skip
    if backward:
        launch(
            _keys, (lines * cdiv(keys, tokens),), projected, terms, v_bias, grad, out, pad_out, log_sums, deltas,
            *numbers, **tile,
        )  # fmt: skip
