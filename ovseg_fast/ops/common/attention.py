"""Plain attention, softmax(q kᵀ / √d + mask) v: PyTorch's own, or xformers' on request."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    attention: str = "sdpa",
) -> Tensor:
    """Multi-head attention without projections.

    Args:
        q: (B, heads, N, d); k, v: (B, heads, M, d).
        mask: True where a key is seen, or a term added to the scores; (..., N, M), broadcast to (B, heads, N, M).
        causal: query n sees the keys 0..n only; not together with `mask`.
        dropout: probability with which attention weights are dropped.
        attention: `"sdpa"`, PyTorch's scaled_dot_product_attention, or `"xformers"`, its memory_efficient_attention.

    Returns:
        (B, heads, N, d).

    Raises:
        ValueError: unknown attention, or both `mask` and `causal` are given.
        ImportError: xformers is not installed. RuntimeError: it has no operator for these tensors.
    """
    check_attention(attention)
    if mask is not None and causal:
        raise ValueError("plain_attention: give mask or causal, not both.")
    if attention == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    operators = _xformers_operators()
    bias = operators.LowerTriangularMask() if causal else None
    if mask is not None:
        bias = _bias(mask, q, k.shape[2])
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # xformers' layout is (B, N, heads, d)
    try:
        attended = operators.memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout)
    except NotImplementedError as error:
        dtype = str(q.dtype).removeprefix("torch.")
        raise RuntimeError(
            f"xformers has no memory-efficient attention for {dtype} tensors of shape {tuple(q.shape)} on {q.device}, "
            "or was installed without its compiled operators (see `python -m xformers.info`); use attention='sdpa'."
        ) from error
    return attended.transpose(1, 2)


def check_attention(attention: str) -> None:
    """Raises ValueError for an unknown attention."""
    if attention not in ("sdpa", "xformers"):
        raise ValueError(f"attention must be 'sdpa' or 'xformers', got {attention!r}.")


def prepare_attention(attention: str) -> None:
    """Check early what a model is built with: ValueError for an unknown attention, ImportError without xformers."""
    check_attention(attention)
    if attention == "xformers":
        _xformers_operators()


def _xformers_operators() -> Any:
    """The module xformers.ops. Raises ImportError, with installation instructions, if xformers is not installed."""
    try:
        import xformers.ops
    except ImportError as error:
        reason = f"attention='xformers' needs the package xformers, which cannot be imported ({error})"
        raise ImportError(f"{reason}; `pip install xformers` installs it.") from error
    return xformers.ops


def _bias(mask: Tensor, q: Tensor, keys: int) -> Tensor:
    """The mask as xformers takes it: added to the scores, full size, rows aligned to eight elements."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    rows = mask.to(q.dtype).expand(*mask.shape[:-1], keys)
    return F.pad(rows, (0, -keys % 8))[..., :keys].expand(*q.shape[:3], keys)
