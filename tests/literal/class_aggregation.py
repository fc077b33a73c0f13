"""Class aggregation of CAT-Seg (arXiv 2303.11797): a transformer over the classes of a position, linear by default.

Parameter names are those of the published checkpoints, below `layers.<i>.attention.`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layers import layer_norm, linear, resize

EPSILON = 1e-6


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """φ(q)·(Σ φ(k)ᵀ v) / (φ(q)·Σ φ(k) + 1e-6) with φ = elu + 1 (arXiv 2006.16236); all (N, L, heads, d)."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    kv = torch.einsum("nshd,nshv->nhdv", k, v)
    z = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(dim=1)) + EPSILON)
    return torch.einsum("nlhd,nhdv,nlh->nlhv", q, kv, z)


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ / √d)·v; all (N, L, heads, d)."""
    scores = torch.einsum("nlhd,nshd->nlsh", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("nlsh,nshd->nlhd", scores.softmax(dim=2), v)


def class_aggregation(
    weights: dict[str, Tensor],
    prefix: str,
    x: Tensor,
    guidance: Tensor,
    pooling: int | tuple[int, int] = 2,
    pad_len: int = 256,
    heads: int = 4,
    attention: str = "linear",
) -> Tensor:
    """x + resize(transformer over classes(pool(x))), the pooled residual included.

    Fewer than `pad_len` classes are padded to it with a learned token and a learned guidance vector, which take part
    like any other class and are dropped at the end. `attention` is "linear" or "full" (softmax).
    x (B, C, T, H, W), guidance (B, T, G); `prefix` ends in `attention.` -> (B, C, T, H, W).
    """
    B, C, T, H, W = x.shape
    pooled = F.avg_pool2d(x.permute(0, 2, 1, 3, 4).reshape(B * T, C, H, W), pooling)
    h, w = pooled.shape[-2:]
    tokens = pooled.reshape(B, T, C, h, w).permute(0, 3, 4, 1, 2).reshape(B * h * w, T, C)
    text = guidance[:, None].repeat(1, h * w, 1, 1).reshape(B * h * w, T, -1)
    if pad_len > T:
        tokens = torch.cat([tokens, weights[prefix + "padding_tokens"].repeat(B * h * w, pad_len - T, 1)], dim=1)
        text = torch.cat([text, weights[prefix + "padding_guidance"].repeat(B * h * w, pad_len - T, 1)], dim=1)

    N, L, _ = tokens.shape
    normed = layer_norm(weights, prefix + "norm1", tokens)
    guided = torch.cat([normed, text], dim=-1)
    q = linear(weights, prefix + "attention.q", guided).reshape(N, L, heads, -1)
    k = linear(weights, prefix + "attention.k", guided).reshape(N, L, heads, -1)
    v = linear(weights, prefix + "attention.v", normed).reshape(N, L, heads, -1)
    attend = full_attention if attention == "full" else linear_attention
    tokens = tokens + attend(q, k, v).reshape(N, L, C)
    hidden = F.relu(linear(weights, prefix + "MLP.0", layer_norm(weights, prefix + "norm2", tokens)))
    tokens = tokens + linear(weights, prefix + "MLP.2", hidden)

    tokens = tokens[:, :T].reshape(B, h, w, T, C).permute(0, 3, 4, 1, 2).reshape(B * T, C, h, w)
    tokens = resize(tokens, (H, W), align_corners=True)
    return x + tokens.reshape(B, T, C, H, W).permute(0, 2, 1, 3, 4)
