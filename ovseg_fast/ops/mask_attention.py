"""Mask attention: cross-attention of class queries on patch tokens whose raw scores are the class masks.

    q = W_q x + b_q,   k = W_k m + b_k,   v = W_v m + b_v           heads of width d
    scores = (1 / heads) Σ_h q_h · k_hᵀ / √d                        before the softmax
    output = W_o · softmax(q_h · k_hᵀ / √d) v_h + b_o

Exact rewrite: the mean over heads of per-head dot products is one dot product over the full width,
q · kᵀ / (heads · √d).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .common import legacy, registration
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
    return_scores: bool = True,
    attention: str = "sdpa",
) -> tuple[Tensor, Tensor | None]:
    """Cross-attention that also yields its head-averaged pre-softmax scores (Cascade-CLIP, section 3.4).

    Args:
        queries: (B, T, D) one query a class; memory: (B, S, D) patch tokens.
        q_weight, k_weight, v_weight, proj_weight: (D, D); biases (D,).
        heads: divides D.
        dropout: probability with which attention weights are dropped; the scores never are.
        return_scores: whether the scores are wanted; the output alone is cheaper.
        attention: what the PyTorch form attends with, `"sdpa"` (PyTorch's own) or `"xformers"`.

    Returns:
        output (B, T, D), and scores (B, T, S) or None.

    Raises:
        TypeError, ValueError: a tensor, `heads`, `dropout` or `attention` does not fit. ImportError, RuntimeError:
            xformers is asked for but not installed, or has no operator for these tensors.
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
    check_attention(attention)
    refusal = None
    if dropout > 0:
        refusal = "its kernels have no dropout"
    elif queries.shape[2] > HEAD_WIDTH * heads:
        refusal = f"its kernels take heads of at most {HEAD_WIDTH} channels"
    backend = backends.choose("mask_attention", queries, refusals={"triton": refusal})
    q, k, v = (
        F.linear(tokens, weight, bias)
        for tokens, weight, bias in (
            (queries, q_weight, q_bias),
            (memory, k_weight, k_bias),
            (memory, v_weight, v_bias),
        )
    )
    scores: Tensor | None
    if backend == "torch":
        q_head, k_head, v_head = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        attended = plain_attention(q_head, k_head, v_head, dropout=dropout, attention=attention)
        attended = attended.transpose(1, 2).flatten(-2)
        scores = _scores(q, k, heads) if return_scores else None
    else:
        attended, scores, _, _ = torch.ops.ovseg_fast.mask_attention(
            *registration.autocast(q, k, v), heads, return_scores, backend
        )
        scores = scores if return_scores else None
    return F.linear(attended, proj_weight, proj_bias), scores


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
    backend = backends.choose("mask_attention", queries)
    q, k = F.linear(queries, q_weight, q_bias), F.linear(memory, k_weight, k_bias)
    if backend == "torch":
        return _scores(q, k, heads)
    return torch.ops.ovseg_fast.mask_scores(*registration.autocast(q, k), heads, backend)


def _scores(q: Tensor, k: Tensor, heads: int) -> Tensor:
    scale = 1.0 / (heads * (q.shape[-1] // heads) ** 0.5)
    return torch.matmul(q * scale, k.transpose(1, 2))


# --- kernels: q (B, T, D), k and v (B, S, D) -> output (B, T, D), scores (B, T, S) or empty; and, for the backward, the
# log-sum-exp (B, heads, T) and the output before it is rounded, empty where it is not ---


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, heads: int, scores: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, queries = q.shape[:2]
    return (
        q.new_empty(q.shape),
        q.new_empty((batch, queries, k.shape[1]) if scores else 0),
        q.new_empty(batch, heads, queries, dtype=torch.float32),
        q.new_empty(0 if q.dtype == torch.float32 else q.shape, dtype=torch.float32),
    )


def _attention_backward_fake(
    grad: Tensor,
    scores_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    log_sum: Tensor,
    heads: int,
    need_queries: bool,
    need_keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape if need_queries else 0),
        k.new_empty(k.shape if need_keys else 0),
        v.new_empty(v.shape if need_keys else 0),
    )


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.heads, ctx.scores, ctx.backend = inputs
    attended, _, log_sum, unrounded = output
    ctx.mark_non_differentiable(log_sum, unrounded)
    ctx.set_materialize_grads(False)  # None where a result has no part in the loss
    ctx.save_for_backward(*tensors, attended if attended.dtype == torch.float32 else unrounded, log_sum)


def _attention_backward(
    ctx: Any, grad: Tensor | None, scores_grad: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    q, k, v, attended, log_sum = ctx.saved_tensors
    need_q, need_k, need_v, *_ = ctx.needs_input_grad
    rest = (None, None, None)
    if grad is not None:
        dq, dk, dv = torch.ops.ovseg_fast.mask_attention_backward(
            grad,
            scores_grad if ctx.scores else None,
            q,
            k,
            v,
            attended,
            log_sum,
            ctx.heads,
            need_q,
            need_k or need_v,
            ctx.backend,
        )
        return dq if need_q else None, dk if need_k else None, dv if need_v else None, *rest
    if scores_grad is not None and ctx.scores:
        dq, dk = torch.ops.ovseg_fast.mask_scores_backward(scores_grad, q, k, ctx.heads, need_q, need_k, ctx.backend)
        return dq if need_q else None, dk if need_k else None, None, *rest
    return None, None, None, *rest


def _scores_fake(q: Tensor, k: Tensor, heads: int) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], k.shape[1])


def _scores_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, heads: int, need_queries: bool, need_keys: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape if need_queries else 0), k.new_empty(k.shape if need_keys else 0)


def _scores_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.heads, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _scores_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_q, need_k, *_ = ctx.needs_input_grad
    dq, dk = torch.ops.ovseg_fast.mask_scores_backward(grad, *ctx.saved_tensors, ctx.heads, need_q, need_k, ctx.backend)
    return dq if need_q else None, dk if need_k else None, None, None


legacy.define(
    "mask_attention(Tensor q, Tensor k, Tensor v, SymInt heads, bool scores, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "mask_attention",
    _attention_fake,
    backward=_attention_backward,
    setup_context=_attention_context,
)
legacy.define(
    "mask_attention_backward(Tensor grad, Tensor? scores_grad, Tensor q, Tensor k, Tensor v, Tensor output, "
    "Tensor log_sum, SymInt heads, bool need_queries, bool need_keys, str backend) -> (Tensor, Tensor, Tensor)",
    "mask_attention",
    _attention_backward_fake,
)
legacy.define(
    "mask_scores(Tensor q, Tensor k, SymInt heads, str backend) -> Tensor",
    "mask_attention",
    _scores_fake,
    backward=_scores_backward,
    setup_context=_scores_context,
)
legacy.define(
    "mask_scores_backward(Tensor grad, Tensor q, Tensor k, SymInt heads, bool need_queries, bool need_keys, "
    "str backend) -> (Tensor, Tensor)",
    "mask_attention",
    _scores_backward_fake,
)
