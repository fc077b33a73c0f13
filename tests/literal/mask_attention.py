"""Mask attention of Cascade-CLIP's decoders (arXiv 2406.00670; first in SegViT, arXiv 2210.05844)."""

from __future__ import annotations

from torch import Tensor

from ._layers import linear, merge_heads, split_heads


def mask_attention(
    weights: dict[str, Tensor], prefix: str, query: Tensor, memory: Tensor, heads: int = 8
) -> tuple[Tensor, Tensor]:
    """Cross-attention that also yields its scaled scores before the softmax, averaged over the heads.

    query (B, T, E), memory (B, S, E); `prefix` ends in `multihead_attn.` -> (B, T, E), scores (B, T, S).
    """
    q = split_heads(linear(weights, prefix + "q", query), heads)
    k = split_heads(linear(weights, prefix + "k", memory), heads)
    v = split_heads(linear(weights, prefix + "v", memory), heads)
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    out = merge_heads(scores.softmax(dim=-1) @ v)
    return linear(weights, prefix + "proj", out), scores.mean(dim=1)
