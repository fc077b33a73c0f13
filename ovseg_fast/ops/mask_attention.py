"""Mask attention: cross-attention of class queries on patch tokens, and its raw scores, which are the class masks.

    q = W_q x + b_q,   k = W_k m + b_k,   v = W_v m + b_v           heads of width d
    output = W_o · softmax(q_h · k_hᵀ / √d) v_h + b_o               mask_attention
    scores = (1 / heads) Σ_h q_h · k_hᵀ / √d                        mask_scores, before the softmax

Exact rewrite: the mean of the heads' dot products is one over the full width, q · kᵀ / (heads · √d).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .common import registration
from .common.attention import check_attention, plain_attention
from .common.checks import check_heads, check_positive, check_tensors

HEAD_WIDTH = 128  # channels of a head that a kernel's tile holds


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
    attention: str = "sdpa",
) -> Tensor:
    """Cross-attention of a decoder layer (Cascade-CLIP, section 3.4).

    Args:
        queries: (B, T, D) one query per class; memory: (B, S, D) patch tokens.
        q_weight, k_weight, v_weight, proj_weight: (D, D); biases (D,).
        heads: divides D.
        dropout: probability with which attention weights are dropped.
        attention: what the PyTorch form attends with, `"sdpa"` (PyTorch's own) or `"xformers"`.

    Returns:
        (B, T, D).

    Raises:
        TypeError, ValueError: an argument does not fit. ImportError, RuntimeError: as `plain_attention`.
    """
    linears = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
    linears |= {"v_weight": v_weight, "v_bias": v_bias, "proj_weight": proj_weight, "proj_bias": proj_bias}
    _check("mask_attention", queries, memory, heads, linears)
    if not 0 <= dropout <= 1:
        raise ValueError(f"mask_attention: dropout must be in 0..1, got {dropout}.")
    check_attention(attention)
    no_dropout = "its kernels have no dropout" if dropout > 0 else None
    too_wide = f"its kernels take heads of at most {HEAD_WIDTH} channels"
    refusals = {
        "triton": no_dropout or (too_wide if queries.shape[2] > HEAD_WIDTH * heads else None),
        "cpu": no_dropout or (f"attention={attention!r} was asked for" if attention != "sdpa" else None),
    }
    backend = backends.choose("mask_attention", queries, memory, *linears.values(), refusals=refusals)
    q, k = F.linear(queries, q_weight, q_bias), F.linear(memory, k_weight, k_bias)
    v = F.linear(memory, v_weight, v_bias)
    if backend == "torch":
        attended = torch_form(q, k, v, heads, dropout, attention)
    elif backend == "cpu":
        attended = torch.ops.ovseg_fast.mask_attention_inference(*registration.autocast(q, k, v), heads, backend)
    else:
        attended, _, _ = torch.ops.ovseg_fast.mask_attention(*registration.autocast(q, k, v), heads, backend)
    return F.linear(attended, proj_weight, proj_bias)


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
    """Head-averaged scores (B, T, S) of `mask_attention` before the softmax: the masks. Same arguments and errors."""
    linears = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
    _check("mask_scores", queries, memory, heads, linears)
    backend = backends.choose("mask_attention", queries, memory, *linears.values())
    q, k = F.linear(queries, q_weight, q_bias), F.linear(memory, k_weight, k_bias)
    if backend == "torch":
        return scores_torch_form(q, k, heads)
    return torch.ops.ovseg_fast.mask_scores(*registration.autocast(q, k), heads, backend)


def _check(operator: str, queries: Tensor, memory: Tensor, heads: int, linears: dict[str, Tensor]) -> None:
    shapes = {name: (tensor, "D D" if name.endswith("weight") else "D") for name, tensor in linears.items()}
    check_tensors(operator, queries=(queries, "B T D"), memory=(memory, "B S D"), **shapes)
    check_positive(operator, T=queries.shape[1], S=memory.shape[1])
    check_heads(operator, heads, queries.shape[2])


def torch_form(q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float, attention: str) -> Tensor:
    """q (B, T, D), k and v (B, S, D) -> what is attended to (B, T, D)."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    return plain_attention(q, k, v, dropout=dropout, attention=attention).transpose(1, 2).flatten(-2)


def scores_torch_form(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """q (B, T, D), k (B, S, D) -> (B, T, S)."""
    scale = 1.0 / (heads * (q.shape[-1] // heads) ** 0.5)
    return torch.matmul(q * scale, k.transpose(1, 2))


def _fake(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        q.new_empty(q.shape[0], heads, q.shape[1], dtype=torch.float32),
        q.new_empty(0 if q.dtype == torch.float32 else q.shape, dtype=torch.float32),
    )


# Kernels: q (B, T, D), k and v (B, S, D) -> output (B, T, D) and, for the backward, the log-sum-exp (B, heads, T) and
# the output before rounding, empty in float32.
registration.define(
    "mask_attention(Tensor q, Tensor k, Tensor v, SymInt heads) -> (Tensor, Tensor, Tensor)",
    "mask_attention",
    _fake,
    saved=(0, 1, 2),
)
registration.define(  # of the CPU kernel, which has no backward to keep the others for
    "mask_attention_inference(Tensor q, Tensor k, Tensor v, SymInt heads) -> Tensor",
    "mask_attention",
    lambda q, *_: q.new_empty(q.shape),
    differentiable=False,
)
registration.define(
    "mask_scores(Tensor q, Tensor k, SymInt heads) -> Tensor",
    "mask_attention",
    lambda q, k, heads: q.new_empty(q.shape[0], q.shape[1], k.shape[1]),
)
