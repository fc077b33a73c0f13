"""Mask attention.

    s[t, j] = q_t · k_j / √d                                  in each head, of width d
    output_t = Σ_j p[t, j] v_j,     p[t, :] = softmax(s[t, :])
    scores[t, j] = Σ_heads s[t, j] / heads                    one product over the full width: q_t · k_j / (heads · √d)

The softmax is online: a program walks over the keys with a running maximum and sum, so p is never stored, only its
log-sum-exp. One launch gives both results: its first programs own a tile of queries in one head, the rest a tile of
scores.

Backward, from the gradients g of output and e of scores, with p = exp(s − log-sum-exp) recomputed:

    ds[t, j] = p[t, j] (g_t · v_j − g_t · output_t) + e[t, j] / heads
    dq_t = Σ_j ds[t, j] k_j / √d,     dk_j = Σ_t ds[t, j] q_t / √d,     dv_j = Σ_t p[t, j] g_t

One launch again: its first programs own a tile of queries in one head and walk over the keys for dq, the rest own a
tile of keys and walk over the queries for dk and dv, so nothing is summed across programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import block, cdiv, launch, precision, sizes
from .common.math import dot

# Queries and keys of a tile by bytes of an element. Where small tiles are few, they spread the work over more
# multiprocessors; where they are many, large ones read the keys less often. Float32 products do not run on tensor cores
# unless TF32 is allowed, and their unrolled form needs the registers.
FEW = 256  # about two for each multiprocessor of a large GPU
FORWARD_TILES = {
    2: {
        "few": {"QUERIES": 16, "KEYS": 128, "CHANNELS": 64, "warps": 8, "stages": 3},
        "many": {"QUERIES": 64, "KEYS": 64, "CHANNELS": 64, "warps": 4, "stages": 3},
    },
    4: {count: {"QUERIES": 16, "KEYS": 32, "CHANNELS": 32} for count in ("few", "many")},
}
SCORES_TILES = {
    2: {
        "few": {"QUERIES": 16, "KEYS": 64, "CHANNELS": 64, "stages": 4},
        "many": {"QUERIES": 64, "KEYS": 64, "CHANNELS": 64, "stages": 3},
    },
    4: {count: {"QUERIES": 16, "KEYS": 32, "CHANNELS": 32} for count in ("few", "many")},
}
# For dq a program owns QUERIES and reads KEYS at a time, for dk and dv it owns KEYS_OWN and reads QUERIES_READ.
BACKWARD_TILES = {
    2: {
        "few": {"QUERIES": 16, "KEYS": 128, "KEYS_OWN": 64, "QUERIES_READ": 16, "stages": 3},
        "many": {"QUERIES": 64, "KEYS": 64, "KEYS_OWN": 64, "QUERIES_READ": 32},
    },
    4: {count: {"QUERIES": 16, "KEYS": 32, "KEYS_OWN": 32, "QUERIES_READ": 16} for count in ("few", "many")},
}

LOG2_E = 1.4426950408889634  # exponentials are taken to base 2, in which scores and log-sum-exp are kept


@triton.jit
def _rows(start, rows, head, heads, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets and mask of a tile of rows of one head, (ROWS, WIDTH), in a tensor (rows, heads · width)."""
    row = start + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    offset = row[:, None].to(tl.int64) * (heads * width) + (head * width + column)[None, :]
    return offset, (row < rows)[:, None] & (column < width)[None, :]


@triton.jit
def _attend(
    q, k, v, output, unrounded, log_sum, program, queries, keys, heads, width, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one tile of queries in one head."""
    tiles = tl.cdiv(queries, QUERIES)
    sequence = program // tiles
    start = program % tiles * QUERIES
    batch = (sequence // heads).to(tl.int64)
    head = sequence % heads
    k += batch * keys * heads * width
    v += batch * keys * heads * width
    own, own_mask = _rows(start, queries, head, heads, width, QUERIES, WIDTH)
    own += batch * queries * heads * width
    q_tile = tl.load(q + own, mask=own_mask, other=0.0)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    weighted = tl.zeros((QUERIES, WIDTH), tl.float32)
    for first in range(0, keys, KEYS):
        other, mask = _rows(first, keys, head, heads, width, KEYS, WIDTH)
        k_tile = tl.load(k + other, mask=mask, other=0.0)
        v_tile = tl.load(v + other, mask=mask, other=0.0)
        s = dot(q_tile, tl.trans(k_tile), tl.zeros((QUERIES, KEYS), tl.float32), PRECISION) * scale
        s = tl.where((first + tl.arange(0, KEYS) < keys)[None, :], s, float("-inf"))
        larger = tl.maximum(largest, tl.max(s, 1))
        # Where all scores of a row are −∞ its weights are 0, as in PyTorch's fused attention; −∞ − (−∞) would be NaN.
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        p = tl.exp2(s - reference[:, None])
        shrink = tl.exp2(largest - reference)
        total = total * shrink + tl.sum(p, 1)
        weighted = dot(p.to(v.dtype.element_ty), v_tile, weighted * shrink[:, None], PRECISION)
        largest = larger
    total = tl.where(total == 0.0, 1.0, total)
    weighted /= total[:, None]
    tl.store(output + own, weighted, mask=own_mask)
    if output.dtype != unrounded.dtype:
        tl.store(unrounded + own, weighted, mask=own_mask)
    row = start + tl.arange(0, QUERIES)
    logarithm = tl.where(largest == float("-inf"), 0.0, largest) + tl.log2(total)
    tl.store(log_sum + sequence.to(tl.int64) * queries + row, logarithm, mask=row < queries)


@triton.jit
def _score(
    q, k, scores, program, queries, keys, channels, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries and keys of the head-averaged scores."""
    key_tiles = tl.cdiv(keys, KEYS)
    tiles = tl.cdiv(queries, QUERIES) * key_tiles
    batch = (program // tiles).to(tl.int64)
    t = program % tiles // key_tiles * QUERIES + tl.arange(0, QUERIES)
    j = program % key_tiles * KEYS + tl.arange(0, KEYS)
    q += batch * queries * channels
    k += batch * keys * channels
    products = tl.zeros((QUERIES, KEYS), tl.float32)
    for first in range(0, channels, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        q_mask = (t < queries)[:, None] & (c < channels)[None, :]
        k_mask = (j < keys)[:, None] & (c < channels)[None, :]
        q_tile = tl.load(q + t[:, None].to(tl.int64) * channels + c[None, :], mask=q_mask, other=0.0)
        k_tile = tl.load(k + j[:, None].to(tl.int64) * channels + c[None, :], mask=k_mask, other=0.0)
        products = dot(q_tile, tl.trans(k_tile), products, PRECISION)
    target = scores + batch * queries * keys + t[:, None].to(tl.int64) * keys + j[None, :]
    tl.store(target, products * scale, mask=(t < queries)[:, None] & (j < keys)[None, :])


@triton.jit
def _attention(
    q, k, v, output, unrounded, log_sum, scores, attending, queries, keys, heads, width, scale, scores_scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, SCORES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if SCORES:
        if program < attending:
            _attend(
                q, k, v, output, unrounded, log_sum, program, queries, keys, heads, width, scale,
                QUERIES, KEYS, WIDTH, PRECISION,
            )  # fmt: skip
        else:
            _score(
                q, k, scores, program - attending, queries, keys, heads * width, scores_scale,
                QUERIES, KEYS, CHANNELS, PRECISION,
            )  # fmt: skip
    else:
        _attend(
            q, k, v, output, unrounded, log_sum, program, queries, keys, heads, width, scale,
            QUERIES, KEYS, WIDTH, PRECISION,
        )  # fmt: skip


@triton.jit
def _scores(
    q, k, scores, queries, keys, channels, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    _score(q, k, scores, tl.program_id(0), queries, keys, channels, scale, QUERIES, KEYS, CHANNELS, PRECISION)


def _tile(tiles: dict[int, dict[str, dict[str, int]]], q: Tensor, copies: int, width: int = 64) -> dict[str, int]:
    """Sizes of a tile where each query of `q` (B, T, D) is in `copies` tiles, for heads of `width` channels."""
    few, many = sizes(tiles, q).values()
    tile = few if q.shape[0] * copies * cdiv(q.shape[1], few["QUERIES"]) <= FEW else many
    return tile if width <= 64 else tile | {"KEYS": tile["KEYS"] // 2}  # shared memory holds no more


def mask_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scores: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (B, T, D), k and v (B, S, D) -> output (B, T, D), scores (B, T, S) or empty, and for the backward log-sum-exp
    (B, heads, T) and, of low precision, the output in float32: rounded, it would blur g · output, which cancels."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    batch, queries, channels = q.shape
    keys, width = k.shape[1], channels // heads
    output = torch.empty_like(q)
    log_sum = q.new_empty(batch, heads, queries, dtype=torch.float32)
    unrounded = q.new_empty(0 if q.dtype == torch.float32 else q.shape, dtype=torch.float32)
    averaged = q.new_empty((batch, queries, keys) if scores else 0)
    tile = _tile(FORWARD_TILES, q, heads, width)
    query_tiles, key_tiles = cdiv(queries, tile["QUERIES"]), cdiv(keys, tile["KEYS"])
    attending = batch * heads * query_tiles
    launch(
        _attention, (attending + (batch * query_tiles * key_tiles if scores else 0),),
        q, k, v, output, unrounded, log_sum, averaged, attending, queries, keys, heads, width,
        LOG2_E * width**-0.5, width**-0.5 / heads,
        **tile, WIDTH=block(width), SCORES=scores, PRECISION=precision(),
    )  # fmt: skip
    return output, averaged, log_sum, unrounded


def mask_scores(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """q (B, T, D), k (B, S, D) -> head-averaged scores (B, T, S)."""
    q, k = q.contiguous(), k.contiguous()
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
def _gradient(
    a, b, c, d, log_sum, along, e, heads, mask, scale, SCORES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p and ds of a tile: p from a · bᵀ and the log-sum-exp, ds from c · dᵀ and g · output; 0 where `mask` is not set.

    (a, b, c, d) are (q, k, g, v) for a tile (queries, keys), (k, q, v, g) for its transpose. `e` points to e's tile.
    """
    zeros = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
    p = tl.where(mask, tl.exp2(dot(a, tl.trans(b), zeros, PRECISION) * scale - log_sum), 0.0)
    ds = tl.where(mask, p * (dot(c, tl.trans(d), zeros, PRECISION) - along), 0.0)
    if SCORES:
        ds += tl.load(e, mask=mask, other=0.0).to(tl.float32) / heads
    return p, ds


@triton.jit
def _queries_gradient(
    q, k, v, g, e, output, log_sum, dq, program, queries, keys, heads, width, scale, derivative,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, SCORES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries in one head."""
    tiles = tl.cdiv(queries, QUERIES)
    sequence = program // tiles
    start = program % tiles * QUERIES
    batch = (sequence // heads).to(tl.int64)
    head = sequence % heads
    k += batch * keys * heads * width
    v += batch * keys * heads * width
    own, own_mask = _rows(start, queries, head, heads, width, QUERIES, WIDTH)
    own += batch * queries * heads * width
    t = start + tl.arange(0, QUERIES)
    q_tile = tl.load(q + own, mask=own_mask, other=0.0)
    g_tile = tl.load(g + own, mask=own_mask, other=0.0)
    attended = tl.load(output + own, mask=own_mask, other=0.0).to(tl.float32)
    along = tl.sum(g_tile.to(tl.float32) * attended, 1)
    logarithm = tl.load(log_sum + sequence.to(tl.int64) * queries + t, mask=t < queries, other=0.0)
    total = tl.zeros((QUERIES, WIDTH), tl.float32)
    for first in range(0, keys, KEYS):
        j = first + tl.arange(0, KEYS)
        other, mask = _rows(first, keys, head, heads, width, KEYS, WIDTH)
        k_tile = tl.load(k + other, mask=mask, other=0.0)
        v_tile = tl.load(v + other, mask=mask, other=0.0)
        _, ds = _gradient(
            q_tile, k_tile, g_tile, v_tile, logarithm[:, None], along[:, None],
            e + (batch * queries + t)[:, None] * keys + j[None, :], heads,
            (t < queries)[:, None] & (j < keys)[None, :], scale, SCORES, PRECISION,
        )  # fmt: skip
        total = dot(ds.to(k.dtype.element_ty), k_tile, total, PRECISION)
    tl.store(dq + own, total * derivative, mask=own_mask)


@triton.jit
def _keys_gradients(
    q, k, v, g, e, output, log_sum, dk, dv, program, queries, keys, heads, width, scale, derivative,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, SCORES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys in one head."""
    tiles = tl.cdiv(keys, KEYS)
    sequence = program // tiles
    start = program % tiles * KEYS
    batch = (sequence // heads).to(tl.int64)
    head = sequence % heads
    q += batch * queries * heads * width
    g += batch * queries * heads * width
    output += batch * queries * heads * width
    own, own_mask = _rows(start, keys, head, heads, width, KEYS, WIDTH)
    own += batch * keys * heads * width
    j = start + tl.arange(0, KEYS)
    k_tile = tl.load(k + own, mask=own_mask, other=0.0)
    v_tile = tl.load(v + own, mask=own_mask, other=0.0)
    k_total = tl.zeros((KEYS, WIDTH), tl.float32)
    v_total = tl.zeros((KEYS, WIDTH), tl.float32)
    for first in range(0, queries, QUERIES):
        t = first + tl.arange(0, QUERIES)
        other, mask = _rows(first, queries, head, heads, width, QUERIES, WIDTH)
        q_tile = tl.load(q + other, mask=mask, other=0.0)
        g_tile = tl.load(g + other, mask=mask, other=0.0)
        attended = tl.load(output + other, mask=mask, other=0.0).to(tl.float32)
        along = tl.sum(g_tile.to(tl.float32) * attended, 1)
        logarithm = tl.load(log_sum + sequence.to(tl.int64) * queries + t, mask=t < queries, other=0.0)
        p, ds = _gradient(
            k_tile, q_tile, v_tile, g_tile, logarithm[None, :], along[None, :],
            e + (batch * queries + t)[None, :] * keys + j[:, None], heads,
            (j < keys)[:, None] & (t < queries)[None, :], scale, SCORES, PRECISION,
        )  # fmt: skip
        v_total = dot(p.to(v.dtype.element_ty), g_tile, v_total, PRECISION)
        k_total = dot(ds.to(q.dtype.element_ty), q_tile, k_total, PRECISION)
    tl.store(dk + own, k_total * derivative, mask=own_mask)
    tl.store(dv + own, v_total, mask=own_mask)


@triton.jit
def _backward(
    q, k, v, g, e, output, log_sum, dq, dk, dv, of_queries, queries, keys, heads, width, scale, derivative,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, KEYS_OWN: tl.constexpr, QUERIES_READ: tl.constexpr, WIDTH: tl.constexpr,
    SCORES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < of_queries:
        _queries_gradient(
            q, k, v, g, e, output, log_sum, dq, program, queries, keys, heads, width, scale,
            derivative, QUERIES, KEYS, WIDTH, SCORES, PRECISION,
        )  # fmt: skip
    else:
        _keys_gradients(
            q, k, v, g, e, output, log_sum, dk, dv, program - of_queries, queries, keys, heads, width, scale,
            derivative, QUERIES_READ, KEYS_OWN, WIDTH, SCORES, PRECISION,
        )  # fmt: skip


def mask_attention_backward(
    g: Tensor, e: Tensor | None, q: Tensor, k: Tensor, v: Tensor, output: Tensor, log_sum: Tensor, heads: int,
    need_queries: bool, need_keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v from those of output, `g`, and of scores, `e`, where the scores had a part in the loss;
    an empty tensor where none is needed."""
    q, k, v, g, output = (tensor.contiguous() for tensor in (q, k, v, g, output))
    batch, queries, channels = q.shape
    keys, width = k.shape[1], channels // heads
    dq = torch.empty_like(q) if need_queries else q.new_empty(0)
    dk, dv = (torch.empty_like(x) if need_keys else x.new_empty(0) for x in (k, v))
    tile = _tile(BACKWARD_TILES, q, heads, width)
    of_queries = batch * heads * cdiv(queries, tile["QUERIES"]) if need_queries else 0
    of_keys = batch * heads * cdiv(keys, tile["KEYS_OWN"]) if need_keys else 0
    launch(
        _backward, (of_queries + of_keys,),
        q, k, v, g, g if e is None else e.contiguous(), output, log_sum, dq, dk, dv,
        of_queries, queries, keys, heads, width, LOG2_E * width**-0.5, width**-0.5,
        **tile, WIDTH=block(width), SCORES=e is not None, PRECISION=precision(),
    )  # fmt: skip
    return dq, dk, dv


def mask_scores_backward(
    e: Tensor, q: Tensor, k: Tensor, heads: int, need_queries: bool, need_keys: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k from that of the scores: two plain products, which the library multiplies."""
    scale = (q.shape[-1] // heads) ** -0.5 / heads

    def product(x: Tensor, y: Tensor, like: Tensor, needed: bool) -> Tensor:
        if not needed:
            return like.new_empty(0)
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        return torch.baddbmm(out, x, y, beta=0, alpha=scale, out=out)

    return product(e, k, q, need_queries), product(e.transpose(1, 2), q, k, need_keys)
