"""Class aggregation: linear attention over the classes of a position, with its pooling, MLP and resize.

With n = LN(average-pool(x)), at each pooled position and head, φ = elu + 1, sums over the classes t, and the padding
class as one more key with the weight `pads`:

    q_t = φ(W_q n_t + g_t),   k_t = φ(W_k n_t + h_t),   v_t = W_v n_t + b
    S = Σ w_t k_t ⊗ (v_t − m),   z = Σ w_t k_t,   m = Σ w_t v_t
    y_t = average-pool(x)_t + m + a_t,   a_t = (q_t · S − ε m) / e_t,   e_t = q_t · z + ε

where N = T + pads, ε = 1e-6 / N, and w_t = 1 / N, or pads / N for the padding class. Dividing by N keeps S in float16's
range. Subtracting m keeps the values' differences precise, all that the gradients of queries and keys depend on.

Backward, from the gradient g_t of y_t, and with r_t = g_t / e_t:

    dq_t = S r_t − z (a_t · r_t)                 dS = Σ q_t ⊗ r_t,   dz = −Σ q_t (a_t · r_t)
    dk_t = w_t (dS (v_t − m) + dz)               dv_t = w_t dSᵀ k_t
    dq'_t = dq_t · φ'(q'),  dk'_t likewise,      φ' = min(φ, 1),  ' marking what φ is applied to
    dn_t = W_qᵀ dq'_t + W_kᵀ dk'_t + W_vᵀ dv_t   dx = pooling's share of (g + LayerNorm's gradient from dn)

PyTorch takes the gradients of the weights, products of dq', dk', dv with n, and of g, h, b, their sums. Pooling and
LayerNorm are in `class_aggregation_tokens`, full attention in `class_aggregation_softmax`, the last resize in
`class_aggregation_resize`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .class_aggregation_resize import resize_add, resize_backward
from .class_aggregation_softmax import attend
from .class_aggregation_tokens import normed_tokens, pooled, tokens_backward
from .common.launch import block, cdiv, launch, precision, sizes
from .common.math import dot, rounded
from .common.residual_mlp import residual_mlp, residual_mlp_backward

__all__ = [
    "class_aggregation",
    "class_attention_backward",
    "residual_mlp_backward",
    "resize_backward",
    "tokens_backward",
]

NORMALISER_EPS = tl.constexpr(1e-6)
GROUP_HEADS = 4  # at most, in one program

# Classes per tile, channels of the heads of a program, channels loaded per step; by bytes of an element. Without TF32,
# float32 products do not run on tensor cores, and their unrolled form needs the registers.
TILES = {2: {"TOKENS": 32, "GROUP": 64, "SLICE": 64}, 4: {"TOKENS": 32, "GROUP": 32, "SLICE": 32}}


@triton.jit
def _feature(x):
    """φ = elu + 1."""
    return tl.where(x > 0, x + 1.0, tl.exp(x))


@triton.jit
def _head_sums(x, head, HEADS: tl.constexpr):
    """The sum of x over each head's channels, at each of them; `head` (1, GROUP) is the head of each channel."""
    total = tl.zeros(x.shape, tl.float32)
    for h in tl.static_range(HEADS):
        head_sum = tl.sum(tl.where(head == h, x, 0.0), 1, keep_dims=True)
        total += tl.where(head == h, head_sum, 0.0)
    return total


@triton.jit
def _query(normed, row, row_mask, terms, t, weight, c, valid, channels, SLICE: tl.constexpr, PRECISION: tl.constexpr):
    """φ(q') of one tile (TOKENS, GROUP)."""
    acc = tl.zeros((t.shape[0], c.shape[0]), tl.float32)
    for start in range(0, channels, SLICE):
        s = start + tl.arange(0, SLICE)
        slice_mask = (s < channels)[None, :]
        n = tl.load(normed + row[:, None] * channels + s[None, :], mask=row_mask & slice_mask, other=0.0)
        w = tl.load(weight + c[:, None] * channels + s[None, :], mask=valid[:, None] & slice_mask, other=0.0)
        acc = dot(n, tl.trans(w), acc, PRECISION)
    mask = row_mask & valid[None, :]
    g = tl.load(terms + t[:, None] * (2 * channels) + c[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, _feature(acc + g), 0.0)


@triton.jit
def _key_value(
    normed, row, row_mask, terms, t, weight, v_bias, c, valid, channels, SLICE: tl.constexpr, PRECISION: tl.constexpr
):
    """φ(k') and v of one tile, both (TOKENS, GROUP)."""
    k = tl.zeros((t.shape[0], c.shape[0]), tl.float32)
    v = tl.zeros((t.shape[0], c.shape[0]), tl.float32)
    for start in range(0, channels, SLICE):
        s = start + tl.arange(0, SLICE)
        slice_mask = (s < channels)[None, :]
        n = tl.load(normed + row[:, None] * channels + s[None, :], mask=row_mask & slice_mask, other=0.0)
        mask = valid[:, None] & slice_mask
        k_pointers = weight + (channels + c)[:, None] * channels + s[None, :]
        w = tl.load(k_pointers, mask=mask, other=0.0)
        k = dot(n, tl.trans(w), k, PRECISION)
        w = tl.load(k_pointers + channels * channels, mask=mask, other=0.0)
        v = dot(n, tl.trans(w), v, PRECISION)
    mask = row_mask & valid[None, :]
    offset = t[:, None] * (2 * channels) + channels + c[None, :]
    k += tl.load(terms + offset, mask=mask, other=0.0).to(tl.float32)
    v += tl.load(v_bias + c, mask=valid, other=0.0).to(tl.float32)[None, :]
    return tl.where(mask, _feature(k), 0.0), tl.where(mask, v, 0.0)


@triton.jit
def _linear(
    normed, x, terms, weight, v_bias, grad, out, pad_out,
    classes, positions, pads, height, width, channels, pooling, terms_stride, padding_row, head_channels,
    group_channels, HEADS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr, SLICE: tl.constexpr,
    PRECISION: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """One position and one group of heads. Forward: out is y, (tokens, C). Backward: out is (dq', dk', dv),
    (tokens, 3C), and pad_out the (dk', dv) of the padding class at this position."""
    # Factors are rounded first, so that what should cancel in a sum does.
    dtype = normed.dtype.element_ty
    groups = tl.cdiv(channels, group_channels)
    position = (tl.program_id(0) // groups).to(tl.int64)  # among those of all images
    image = position // positions
    lane = tl.arange(0, GROUP)
    c = tl.program_id(0) % groups * group_channels + lane
    valid = (lane < group_channels) & (c < channels)
    head = (lane // head_channels)[None, :]
    same_head = ((lane // head_channels)[:, None] == head) & valid[:, None] & valid[None, :]
    terms += image * terms_stride
    first_row = image * classes * positions + position % positions
    keys = classes + (pads > 0)

    kv = tl.zeros((GROUP, GROUP), tl.float32)
    k_sum = tl.zeros((GROUP,), tl.float32)
    v_mean = tl.zeros((GROUP,), tl.float32)
    inverse_count = 1.0 / (classes + pads)
    for start in range(0, keys, TOKENS):
        t = start + tl.arange(0, TOKENS)
        row = tl.where(t < classes, first_row + t.to(tl.int64) * positions, padding_row)
        k, v = _key_value(
            normed, row, (t < keys)[:, None], terms, t, weight, v_bias, c, valid, channels, SLICE, PRECISION
        )
        key_weight = (tl.where(t < classes, 1, pads).to(tl.float32) * inverse_count)[:, None]
        k = rounded(k * key_weight, dtype)
        v = rounded(v, dtype)
        k_sum += tl.sum(k.to(tl.float32), 0)
        v_mean += tl.sum(v.to(tl.float32) * key_weight, 0)
        kv = dot(tl.trans(k), v, kv, PRECISION)
    kv = rounded(tl.where(same_head, kv - k_sum[:, None] * v_mean[None, :], 0.0), dtype)

    kv_grad = tl.zeros((GROUP, GROUP), tl.float32)
    k_sum_grad = tl.zeros((GROUP,), tl.float32)
    for start in range(0, classes, TOKENS):
        t = start + tl.arange(0, TOKENS)
        row = first_row + t.to(tl.int64) * positions
        row_mask = (t < classes)[:, None]
        mask = row_mask & valid[None, :]
        q = _query(normed, row, row_mask, terms, t, weight, c, valid, channels, SLICE, PRECISION)
        q = rounded(q, dtype)
        queries = q.to(tl.float32)
        normaliser = _head_sums(queries * k_sum[None, :], head, HEADS) + NORMALISER_EPS * inverse_count
        attended = dot(q, kv, tl.zeros((TOKENS, GROUP), tl.float32), PRECISION)
        attended = (attended - NORMALISER_EPS * inverse_count * v_mean[None, :]) / normaliser
        offset = row[:, None] * channels + c[None, :]
        if BACKWARD:
            r = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32) / normaliser
            r = rounded(tl.where(mask, r, 0.0), dtype)
            delta = -_head_sums(attended * r.to(tl.float32), head, HEADS)
            kv_grad = dot(tl.trans(q), r, kv_grad, PRECISION)
            k_sum_grad += tl.sum(queries * delta, 0)
            dq = dot(r, tl.trans(kv), k_sum[None, :] * delta, PRECISION) * tl.minimum(queries, 1.0)
            tl.store(out + row[:, None] * (3 * channels) + c[None, :], rounded(dq, dtype), mask=mask)
        else:
            y = pooled(x, row, c, mask, height, width, channels, pooling) + (v_mean[None, :] + attended)
            tl.store(out + offset, rounded(y, dtype), mask=mask)

    if BACKWARD:
        kv_grad = rounded(tl.where(same_head, kv_grad * inverse_count, 0.0), dtype)
        k_sum_grad *= inverse_count
        for start in range(0, keys, TOKENS):
            t = start + tl.arange(0, TOKENS)
            row = tl.where(t < classes, first_row + t.to(tl.int64) * positions, padding_row)
            k, v = _key_value(
                normed, row, (t < keys)[:, None], terms, t, weight, v_bias, c, valid, channels, SLICE, PRECISION
            )
            count = tl.where(t < classes, 1, pads).to(tl.float32)[:, None]
            v = rounded(rounded(v, dtype).to(tl.float32) - v_mean[None, :], dtype)
            dk = dot(v, tl.trans(kv_grad), tl.zeros((TOKENS, GROUP), tl.float32), PRECISION)
            dk = (dk + k_sum_grad[None, :]) * tl.minimum(k, 1.0) * count
            dv = dot(rounded(k, dtype), kv_grad, tl.zeros((TOKENS, GROUP), tl.float32), PRECISION) * count
            pointers = out + row[:, None] * (3 * channels) + channels + c[None, :]
            mask = (t < classes)[:, None] & valid[None, :]
            tl.store(pointers, rounded(dk, dtype), mask=mask)
            tl.store(pointers + channels, rounded(dv, dtype), mask=mask)
            pointers = pad_out + position * (2 * channels) + c[None, :] + t[:, None] * 0
            mask = (t >= classes)[:, None] & (t < keys)[:, None] & valid[None, :]
            tl.store(pointers, dk, mask=mask)
            tl.store(pointers + channels, dv, mask=mask)


def _attention(
    normed: Tensor, x: Tensor, terms: Tensor, weight: Tensor, v_bias: Tensor, grad: Tensor, out: Tensor,
    pad_out: Tensor, pads: int, heads: int, pooling: int, full: bool, backward: bool,
) -> None:  # fmt: skip
    if full:
        projected = torch.mm(normed, weight.t())
        return attend(projected, x, terms, v_bias, grad, out, pad_out, pads, heads, pooling, backward)
    batch, classes, height, width, channels = x.shape
    positions = (height // pooling) * (width // pooling)
    tile, head_channels = sizes(TILES, x), channels // heads
    together = max(1, min(heads, tile["GROUP"] // head_channels, GROUP_HEADS))  # heads of a program
    group_channels = together * head_channels
    launch(
        _linear, (batch * positions * cdiv(channels, group_channels),),
        normed, x, terms, weight, v_bias, grad, out, pad_out, classes, positions, pads, height, width, channels,
        pooling, terms.stride(0) if len(terms) > 1 else 0, batch * classes * positions, head_channels, group_channels,
        HEADS=together, TOKENS=block(classes + (pads > 0), 16, tile["TOKENS"]), GROUP=block(group_channels, 16),
        SLICE=block(channels, 16, tile["SLICE"]), PRECISION=precision(), BACKWARD=backward, warps=8,
    )  # fmt: skip


def class_aggregation(
    x: Tensor, terms: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, v_bias: Tensor,
    padding_token: Tensor, *others: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(B, T, H, W, C) -> the same, and y, (B, T, H // pooling, W // pooling, C), empty unless `keep`; `others`: the
    MLP's weights, pads, heads, pooling, full, keep."""
    *mlp, pads, heads, pooling, full, keep = others
    batch, classes, height, width, channels = x.shape
    middle = x.new_empty(batch, classes, height // pooling, width // pooling, channels)
    normed = normed_tokens(x, padding_token, norm_weight, norm_bias, pads, pooling)
    _attention(normed, x, terms, weight, v_bias, x, middle, x, pads, heads, pooling, full, False)
    y = residual_mlp(middle, *mlp, activation="relu")
    return x + y if pooling == 1 else resize_add(x, y), middle if keep else x.new_empty(0)


def class_attention_backward(
    grad: Tensor, x: Tensor, terms: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, v_bias: Tensor,
    padding_token: Tensor, pads: int, heads: int, pooling: int, full: bool,
) -> tuple[Tensor, Tensor, Tensor, None]:  # fmt: skip
    """(dq', dk', dv) of all tokens, (tokens, or one more if there are pads, 3C); (dk', dv) of the padding class,
    (B, positions, 2C), empty without pads; n; no statistics of the norm."""
    normed = normed_tokens(x, padding_token, norm_weight, norm_bias, pads, pooling)
    tokens_grad = x.new_empty(len(normed), 3 * x.shape[-1])
    positions = grad.shape[2] * grad.shape[3]
    pad_grads = x.new_empty(len(x), positions if pads else 0, 2 * x.shape[-1], dtype=torch.float32)
    _attention(normed, x, terms, weight, v_bias, grad, tokens_grad, pad_grads, pads, heads, pooling, full, True)
    return tokens_grad, pad_grads, normed, None
