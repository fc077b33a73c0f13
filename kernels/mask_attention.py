"""Mask attention.

    s[t, j] = q_t · k_j / √d                                  in each head, of width d
    output_t = Σ_j p[t, j] v_j,     p[t, :] = softmax(s[t, :])
    scores[t, j] = Σ_heads s[t, j] / heads                    one product over the full width: q_t · k_j / (heads · √d)

The softmax is online, with a running maximum and sum: of p only its log-sum-exp is stored.

Backward, from the gradient g of output, with p = exp(s − log-sum-exp) recomputed and delta_t = g_t · output_t:

    ds[t, j] = p[t, j] (g_t · v_j − delta_t)
    dq_t = Σ_j ds[t, j] k_j / √d,     dk_j = Σ_t ds[t, j] q_t / √d,     dv_j = Σ_t p[t, j] g_t

In one launch, the first programs take a tile of queries in one head and all keys, for dq, the others a tile of keys
and all queries, for dk and dv: nothing is summed across programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import block, cdiv, launch, precision, sizes
from .common.math import dot

# Queries and keys of a tile by bytes of an element. Few small tiles spread the work over more multiprocessors; if there
# are many, large ones read the keys less often. Float32 products without TF32 need more registers.
FEW = 256  # about two for each multiprocessor of a large GPU
FORWARD_TILES = {
    2: {
        "few": {"QUERIES": 16, "KEYS": 128, "warps": 8, "stages": 3},
        "many": {"QUERIES": 64, "KEYS": 64, "warps": 4, "stages": 3},
    },
    4: {count: {"QUERIES": 16, "KEYS": 32} for count in ("few", "many")},
}
SCORES_TILES = {
    2: {
        "few": {"QUERIES": 16, "KEYS": 64, "CHANNELS": 64, "stages": 4},
        "many": {"QUERIES": 64, "KEYS": 64, "CHANNELS": 64, "stages": 3},
    },
    4: {count: {"QUERIES": 16, "KEYS": 32, "CHANNELS": 32} for count in ("few", "many")},
}
# For dq a program has a tile of QUERIES and reads KEYS at a time; for dk and dv, DKV_KEYS and DKV_QUERIES.
BACKWARD_TILES = {
    2: {
        "few": {"QUERIES": 16, "KEYS": 128, "DKV_KEYS": 64, "DKV_QUERIES": 16, "stages": 3},
        "many": {"QUERIES": 64, "KEYS": 64, "DKV_KEYS": 64, "DKV_QUERIES": 32},
    },
    4: {count: {"QUERIES": 16, "KEYS": 32, "DKV_KEYS": 32, "DKV_QUERIES": 16} for count in ("few", "many")},
}

LOG2_E = 1.4426950408889634  # exponentials are taken to base 2, and so are scores and log-sum-exp


@triton.jit
def _place(program, rows, heads, ROWS: tl.constexpr):
    """Of a program with a tile of rows in one head: its sequence (image and head), image, head and first row."""
    tiles = tl.cdiv(rows, ROWS)
    sequence = program // tiles
    return sequence, (sequence // heads).to(tl.int64), sequence % heads, program % tiles * ROWS


@triton.jit
def _offsets(start, rows, head, heads, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets and mask of a tile of rows of one head, (ROWS, WIDTH), in a tensor (rows, heads · width)."""
    row = start + tl.arange(0, ROWS)
    col = tl.arange(0, WIDTH)
    offset = row[:, None].to(tl.int64) * (heads * width) + (head * width + col)[None, :]
    return offset, (row < rows)[:, None] & (col < width)[None, :]


@triton.jit
def _forward(
    q, k, v, output, unrounded, log_sum_exp, queries, keys, heads, width, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one tile of queries in one head."""
    sequence, batch, head, start = _place(tl.program_id(0), queries, heads, QUERIES)
    k += batch * keys * heads * width
    v += batch * keys * heads * width
    q_offset, q_mask = _offsets(start, queries, head, heads, width, QUERIES, WIDTH)
    q_offset += batch * queries * heads * width
    q_tile = tl.load(q + q_offset, mask=q_mask, other=0.0)
    row_max = tl.full((QUERIES,), float("-inf"), tl.float32)
    row_sum = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, WIDTH), tl.float32)
    for first in range(0, keys, KEYS):
        k_offset, k_mask = _offsets(first, keys, head, heads, width, KEYS, WIDTH)
        k_tile = tl.load(k + k_offset, mask=k_mask, other=0.0)
        v_tile = tl.load(v + k_offset, mask=k_mask, other=0.0)
        s = dot(q_tile, tl.trans(k_tile), tl.zeros((QUERIES, KEYS), tl.float32), PRECISION) * scale
        s = tl.where((first + tl.arange(0, KEYS) < keys)[None, :], s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        # If all scores of a row are −∞ its weights are 0, as in PyTorch's fused attention; −∞ − (−∞) would be NaN.
        reference = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s - reference[:, None])
        rescale = tl.exp2(row_max - reference)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = dot(p.to(v.dtype.element_ty), v_tile, acc * rescale[:, None], PRECISION)
        row_max = new_max
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    acc /= row_sum[:, None]
    tl.store(output + q_offset, acc, mask=q_mask)
    if output.dtype != unrounded.dtype:
        tl.store(unrounded + q_offset, acc, mask=q_mask)
    t = start + tl.arange(0, QUERIES)
    logarithm = tl.where(row_max == float("-inf"), 0.0, row_max) + tl.log2(row_sum)
    tl.store(log_sum_exp + sequence.to(tl.int64) * queries + t, logarithm, mask=t < queries)


@triton.jit
def _scores(
    q, k, scores, queries, keys, channels, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries and keys of the head-averaged scores."""
    key_tiles = tl.cdiv(keys, KEYS)
    tiles = tl.cdiv(queries, QUERIES) * key_tiles
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles // key_tiles * QUERIES + tl.arange(0, QUERIES)
    j = tl.program_id(0) % key_tiles * KEYS + tl.arange(0, KEYS)
    q += batch * queries * channels
    k += batch * keys * channels
    acc = tl.zeros((QUERIES, KEYS), tl.float32)
    for first in range(0, channels, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        q_mask = (t < queries)[:, None] & (c < channels)[None, :]
        k_mask = (j < keys)[:, None] & (c < channels)[None, :]
        q_tile = tl.load(q + t[:, None].to(tl.int64) * channels + c[None, :], mask=q_mask, other=0.0)
        k_tile = tl.load(k + j[:, None].to(tl.int64) * channels + c[None, :], mask=k_mask, other=0.0)
        acc = dot(q_tile, tl.trans(k_tile), acc, PRECISION)
    offset = batch * queries * keys + t[:, None].to(tl.int64) * keys + j[None, :]
    tl.store(scores + offset, acc * scale, mask=(t < queries)[:, None] & (j < keys)[None, :])


def _tile(tiles: dict[int, dict[str, dict[str, int]]], q: Tensor, copies: int, width: int = 64) -> dict[str, int]:
    """Sizes of a tile if each query of `q` (B, T, D) is in `copies` tiles, for heads of `width` channels."""
    few, many = sizes(tiles, q).values()
    tile = few if q.shape[0] * copies * cdiv(q.shape[1], few["QUERIES"]) <= FEW else many
    return tile if width <= 64 else tile | {"KEYS": tile["KEYS"] // 2}  # shared memory holds no more


def mask_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, T, D), k and v (B, S, D) -> output (B, T, D) and, for the backward, log-sum-exp (B, heads, T) and, in low
    precision, the output in float32: rounded, it would blur delta, which cancels."""
    batch, queries, channels = q.shape
    keys, width = k.shape[1], channels // heads
    output = torch.empty_like(q)
    log_sum_exp = q.new_empty(batch, heads, queries, dtype=torch.float32)
    unrounded = q.new_empty(0 if q.dtype == torch.float32 else q.shape, dtype=torch.float32)
    tile = _tile(FORWARD_TILES, q, heads, width)
    launch(
        _forward, (batch * heads * cdiv(queries, tile["QUERIES"]),),
        q, k, v, output, unrounded, log_sum_exp, queries, keys, heads, width, LOG2_E * width**-0.5,
        **tile, WIDTH=block(width), PRECISION=precision(),
    )  # fmt: skip
    return output, log_sum_exp, unrounded


def mask_scores(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """q (B, T, D), k (B, S, D) -> head-averaged scores (B, T, S)."""
    batch, queries, channels = q.shape
    keys = k.shape[1]
    scores = q.new_empty(batch, queries, keys)
    tile = _tile(SCORES_TILES, q, cdiv(keys, 64))
    launch(
        _scores, (batch * cdiv(queries, tile["QUERIES"]) * cdiv(keys, tile["KEYS"]),),
        q, k, scores, queries, keys, channels, (channels // heads) ** -0.5 / heads,
        **tile, PRECISION=precision(),
    )  # fmt: skip
    return scores


@triton.jit
def _gradient(a, b, c, d, log_sum_exp, delta, mask, scale, PRECISION: tl.constexpr):
    """p and ds of a tile, 0 outside `mask`: p from a · bᵀ and the log-sum-exp, ds from c · dᵀ and delta. (a, b, c, d)
    are (q, k, g, v) for a tile (queries, keys), (k, q, v, g) for its transpose."""
    zeros = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
    p = tl.where(mask, tl.exp2(dot(a, tl.trans(b), zeros, PRECISION) * scale - log_sum_exp), 0.0)
    ds = tl.where(mask, p * (dot(c, tl.trans(d), zeros, PRECISION) - delta), 0.0)
    return p, ds


@triton.jit
def _queries_gradient(
    q, k, v, g, output, log_sum_exp, dq, program, queries, keys, heads, width, scale, derivative,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries in one head."""
    sequence, batch, head, start = _place(program, queries, heads, QUERIES)
    k += batch * keys * heads * width
    v += batch * keys * heads * width
    q_offset, q_mask = _offsets(start, queries, head, heads, width, QUERIES, WIDTH)
    q_offset += batch * queries * heads * width
    t = start + tl.arange(0, QUERIES)
    q_tile = tl.load(q + q_offset, mask=q_mask, other=0.0)
    g_tile = tl.load(g + q_offset, mask=q_mask, other=0.0)
    out_tile = tl.load(output + q_offset, mask=q_mask, other=0.0).to(tl.float32)
    delta = tl.sum(g_tile.to(tl.float32) * out_tile, 1)
    logarithm = tl.load(log_sum_exp + sequence.to(tl.int64) * queries + t, mask=t < queries, other=0.0)
    acc = tl.zeros((QUERIES, WIDTH), tl.float32)
    for first in range(0, keys, KEYS):
        j = first + tl.arange(0, KEYS)
        k_offset, k_mask = _offsets(first, keys, head, heads, width, KEYS, WIDTH)
        k_tile = tl.load(k + k_offset, mask=k_mask, other=0.0)
        v_tile = tl.load(v + k_offset, mask=k_mask, other=0.0)
        mask = (t < queries)[:, None] & (j < keys)[None, :]
        _, ds = _gradient(q_tile, k_tile, g_tile, v_tile, logarithm[:, None], delta[:, None], mask, scale, PRECISION)
        acc = dot(ds.to(k.dtype.element_ty), k_tile, acc, PRECISION)
    tl.store(dq + q_offset, acc * derivative, mask=q_mask)


@triton.jit
def _keys_gradients(
    q, k, v, g, output, log_sum_exp, dk, dv, program, queries, keys, heads, width, scale, derivative,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys in one head."""
    sequence, batch, head, start = _place(program, keys, heads, KEYS)
    q += batch * queries * heads * width
    g += batch * queries * heads * width
    output += batch * queries * heads * width
    k_offset, k_mask = _offsets(start, keys, head, heads, width, KEYS, WIDTH)
    k_offset += batch * keys * heads * width
    j = start + tl.arange(0, KEYS)
    k_tile = tl.load(k + k_offset, mask=k_mask, other=0.0)
    v_tile = tl.load(v + k_offset, mask=k_mask, other=0.0)
    dk_acc = tl.zeros((KEYS, WIDTH), tl.float32)
    dv_acc = tl.zeros((KEYS, WIDTH), tl.float32)
    for first in range(0, queries, QUERIES):
        t = first + tl.arange(0, QUERIES)
        q_offset, q_mask = _offsets(first, queries, head, heads, width, QUERIES, WIDTH)
        q_tile = tl.load(q + q_offset, mask=q_mask, other=0.0)
        g_tile = tl.load(g + q_offset, mask=q_mask, other=0.0)
        out_tile = tl.load(output + q_offset, mask=q_mask, other=0.0).to(tl.float32)
        delta = tl.sum(g_tile.to(tl.float32) * out_tile, 1)
        logarithm = tl.load(log_sum_exp + sequence.to(tl.int64) * queries + t, mask=t < queries, other=0.0)
        mask = (j < keys)[:, None] & (t < queries)[None, :]
        p, ds = _gradient(k_tile, q_tile, v_tile, g_tile, logarithm[None, :], delta[None, :], mask, scale, PRECISION)
        dv_acc = dot(p.to(v.dtype.element_ty), g_tile, dv_acc, PRECISION)
        dk_acc = dot(ds.to(q.dtype.element_ty), q_tile, dk_acc, PRECISION)
    tl.store(dk + k_offset, dk_acc * derivative, mask=k_mask)
    tl.store(dv + k_offset, dv_acc, mask=k_mask)


@triton.jit
def _backward(
    q, k, v, g, output, log_sum_exp, dq, dk, dv, dq_programs, queries, keys, heads, width, scale, derivative,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DKV_KEYS: tl.constexpr, DKV_QUERIES: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < dq_programs:
        _queries_gradient(
            q, k, v, g, output, log_sum_exp, dq, program, queries, keys, heads, width, scale, derivative,
            QUERIES, KEYS, WIDTH, PRECISION,
        )  # fmt: skip
    else:
        _keys_gradients(
            q, k, v, g, output, log_sum_exp, dk, dv, program - dq_programs, queries, keys, heads, width, scale,
            derivative, DKV_QUERIES, DKV_KEYS, WIDTH, PRECISION,
        )  # fmt: skip


def mask_attention_backward(
    g: Tensor, output: Tensor, log_sum_exp: Tensor, unrounded: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    need_q, need_kv = needs[0], needs[1] or needs[2]
    batch, queries, channels = q.shape
    keys, width = k.shape[1], channels // heads
    dq = q.new_empty(q.shape if need_q else 0)
    dk, dv = (x.new_empty(x.shape if need_kv else 0) for x in (k, v))
    tile = _tile(BACKWARD_TILES, q, heads, width)
    dq_programs = batch * heads * cdiv(queries, tile["QUERIES"]) if need_q else 0
    dkv_programs = batch * heads * cdiv(keys, tile["DKV_KEYS"]) if need_kv else 0
    launch(
        _backward, (dq_programs + dkv_programs,),
        q, k, v, g, output if output.dtype == torch.float32 else unrounded, log_sum_exp, dq, dk, dv,
        dq_programs, queries, keys, heads, width, LOG2_E * width**-0.5, width**-0.5,
        **tile, WIDTH=block(width), PRECISION=precision(),
    )  # fmt: skip
    return [dq, dk, dv]


def mask_scores_backward(grad: Tensor, q: Tensor, k: Tensor, heads: int, needs: list[bool]) -> list[Tensor | None]:
    """Gradients of q and k: two plain products, which are PyTorch's."""
    scale = (q.shape[-1] // heads) ** -0.5 / heads
    dq = torch.baddbmm(q, grad, k, beta=0, alpha=scale) if needs[0] else None
    dk = torch.baddbmm(k, grad.transpose(1, 2), q, beta=0, alpha=scale) if needs[1] else None
    return [dq, dk]
