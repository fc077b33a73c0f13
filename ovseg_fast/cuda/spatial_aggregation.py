"""Launchers of `csrc/spatial_aggregation.cu`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from .common.layer_norm import EPS, layer_norm_backward
from .common.residual_mlp import residual_mlp_backward as residual_mlp_backward


def spatial_aggregation(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """(B, T, H, W, C) -> the same, and what the attention half gives, empty unless `keep`; `others`: terms, weights,
    heads, window, shift, keep."""
    *tensors, heads, window, shift, keep = others
    out = x.new_empty(x.shape)
    middle = x.new_empty(x.shape if keep else 0)
    hidden = len(tensors[-3])  # b₁
    native.call(
        "ovseg_spatial_aggregation_fwd", x, *tensors, out, middle if keep else None,
        *x.shape, hidden, heads, window, shift,
    )  # fmt: skip
    return out, middle


def window_attention_backward(
    grad: Tensor, x: Tensor, q_term: Tensor, k_term: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    qkv_weight: Tensor, v_bias: Tensor, heads: int, window: int, shift: int, need_attended: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Gradients of q, k and v of each token, (rows, 3C), from that of what was attended to, (rows, C); that itself if
    needed; n, mean and scale of the norm."""
    batch, classes, height, width, channels = x.shape
    statistics = torch.native_layer_norm(x.view(-1, channels), (channels,), norm_weight, norm_bias, EPS)
    tokens = F.linear(statistics[0], qkv_weight).view(batch, classes, height * width, 3, channels)
    tokens = tokens + torch.stack([q_term, k_term, v_bias.expand_as(q_term)], -2).unsqueeze(1)
    tokens_grad = torch.empty_like(tokens)
    attended = grad.new_empty(grad.shape if need_attended else 0)
    native.call(
        "ovseg_spatial_aggregation_attention_bwd", tokens, grad, tokens_grad, attended if need_attended else None,
        *x.shape, heads, window, shift,
    )  # fmt: skip
    return tokens_grad.view(-1, 3 * channels), attended, statistics


def norm_backward(
    normed_grad: Tensor, grad: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    statistics: tuple[Tensor, ...], needs: list[bool], need_normed: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of x, with the residual's, and of the norm's weight and bias; n, (rows, C)."""
    normed, mean, scale = statistics
    rows = x.view(-1, x.shape[-1])
    x_grad, gain, offset = layer_norm_backward(normed_grad, rows, mean, scale, norm_weight, norm_bias, needs)
    return None if x_grad is None else x_grad.view(x.shape) + grad, gain, offset, normed
