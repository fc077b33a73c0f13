"""Launchers of `csrc/cpu/mask_attention.cpp`."""

from __future__ import annotations

from torch import Tensor

from .. import native


def mask_attention_inference(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """(B, T, D) and twice (B, S, D) -> (B, T, D)."""
    batch, queries, channels = q.shape
    out = q.new_empty(q.shape)
    native.call("ovseg_mask_attention_fwd", q, k, v, out, batch, queries, k.shape[1], channels, heads, kind="cpu")
    return out


def mask_scores(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """(B, T, D) and (B, S, D) -> (B, T, S)."""
    batch, queries, channels = q.shape
    out = q.new_empty(batch, queries, k.shape[1])
    native.call("ovseg_mask_attention_scores_fwd", q, k, out, *out.shape, channels, heads, kind="cpu")
    return out
