"""Mask attention: cross-attention of class queries on patch tokens whose raw scores are the class masks.

    q = W_q x + b_q,   k = W_k m + b_k,   v = W_v m + b_v           heads of width d
    scores = (1 / heads) Σ_h q_h · k_hᵀ / √d                        before the softmax
    output = W_o · softmax(q_h · k_hᵀ / √d) v_h + b_o

Exact rewrite: the mean over heads of per-head dot products is one dot product over the full width,
q · kᵀ / (heads · √d).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_heads, check_positive, check_tensors


def mask_attention(
    queries: Tensor,
    memory: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    *,
    heads: int = 8,
    dropout: float = 0.0,
    return_scores: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Cross-attention that also yields its head-averaged pre-softmax scores (Cascade-CLIP, section 3.4).

    Args:
        queries: (B, T, D) one query a class; memory: (B, S, D) patch tokens.
        q_weight, k_weight, v_weight, proj_weight: (D, D); biases (D,).
        heads: divides D.
        dropout: probability with which attention weights are dropped; the scores never are.
        return_scores: whether the scores are wanted; the output alone is cheaper.

    Returns:
        output (B, T, D), and scores (B, T, S) or None.

    Raises:
        TypeError, ValueError: a tensor, `heads` or `dropout` does not fit.
    """
    check_tensors(
        "mask_attention",
        queries=(queries, "B T D"),
        memory=(memory, "B S D"),
        q_weight=(q_weight, "D D"),
        q_bias=(q_bias, "D"),
        k_weight=(k_weight, "D D"),
        k_bias=(k_bias, "D"),
        v_weight=(v_weight, "D D"),
        v_bias=(v_bias, "D"),
        proj_weight=(proj_weight, "D D"),
        proj_bias=(proj_bias, "D"),
    )
    check_positive("mask_attention", T=queries.shape[1], S=memory.shape[1])
    check_heads("mask_attention", heads, queries.shape[2])
    if not 0 <= dropout <= 1:
        raise ValueError(f"mask_attention: dropout must be in 0..1, got {dropout}.")
    q, k, v = (
        F.linear(tokens, weight, bias)
        for tokens, weight, bias in (
            (queries, q_weight, q_bias),
            (memory, k_weight, k_bias),
            (memory, v_weight, v_bias),
        )
    )
    q_head, k_head, v_head = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    attended = F.scaled_dot_product_attention(q_head, k_head, v_head, dropout_p=dropout)
    output = F.linear(attended.transpose(1, 2).flatten(-2), proj_weight, proj_bias)
    return output, _scores(q, k, heads) if return_scores else None


def mask_scores(
    queries: Tensor,
    memory: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    *,
    heads: int = 8,
) -> Tensor:
    """The scores of `mask_attention` alone, (B, T, S): all that a decoder's last layer is asked for."""
    check_tensors(
        "mask_scores",
        queries=(queries, "B T D"),
        memory=(memory, "B S D"),
        q_weight=(q_weight, "D D"),
        q_bias=(q_bias, "D"),
        k_weight=(k_weight, "D D"),
        k_bias=(k_bias, "D"),
    )
    check_positive("mask_scores", T=queries.shape[1], S=memory.shape[1])
    check_heads("mask_scores", heads, queries.shape[2])
    return _scores(F.linear(queries, q_weight, q_bias), F.linear(memory, k_weight, k_bias), heads)


def _scores(q: Tensor, k: Tensor, heads: int) -> Tensor:
    scale = 1.0 / (heads * (q.shape[-1] // heads) ** 0.5)
    return torch.matmul(q * scale, k.transpose(1, 2))
