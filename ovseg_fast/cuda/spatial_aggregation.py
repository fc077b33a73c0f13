"""Launchers of `csrc/spatial_aggregation.cu`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from .common.layer_norm import layer_norm_backward
from .common.residual_mlp import EPS


def spatial_aggregation(
    x: Tensor, q_term: Tensor, k_term: Tensor, norm1_weight: Tensor, norm1_bias: Tensor, qkv_weight: Tensor,
    v_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, norm2_weight: Tensor, norm2_bias: Tensor,
    fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor,
    heads: int, window: int, shift: int, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(B, T, H, W, C) -> the same, and what the attention half gives where `keep`; terms (B, H · W, C)."""
    inputs = [
        native.aligned(tensor)
        for tensor in (
            x, q_term, k_term, norm1_weight, norm1_bias, qkv_weight, v_bias, proj_weight, proj_bias,
            norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
        )
    ]  # fmt: skip
    out = x.new_empty(x.shape)
    middle = x.new_empty(x.shape if keep else 0)
    native.call(
        "ovseg_spatial_aggregation_fwd", *inputs, out, middle if keep else None,
        *x.shape, fc1_weight.shape[0], heads, window, shift,
    )  # fmt: skip
    return out, middle


def window_attention_backward(
    grad: Tensor, x: Tensor, q_term: Tensor, k_term: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    qkv_weight: Tensor, v_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, heads: int, window: int, shift: int,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of the nine tensors of the attention half; an empty tensor where none is needed.

    The kernel takes the attention itself; the products with weights around it are PyTorch's.
    """
    batch, classes, height, width, channels = x.shape
    need_x, need_q, need_k, need_gain, need_offset, need_qkv, need_v_bias, need_proj, need_proj_bias = needs
    rows, flat = x.reshape(-1, channels), grad.reshape(-1, channels)
    grads = [x.new_empty(0) for _ in needs]
    if need_proj_bias:
        grads[8] = flat.sum(0)
    if not any(needs[:8]):
        return grads
    normed, mean, scale = torch.native_layer_norm(rows, (channels,), norm_weight, norm_bias, EPS)
    tokens = F.linear(normed, qkv_weight).view(batch, classes, height * width, 3, channels)
    added = torch.stack([q_term, k_term, v_bias.expand_as(q_term)], -2).unsqueeze(1)
    tokens = native.aligned(tokens + added)
    grad_tokens = torch.empty_like(tokens)
    attended = flat.new_empty(flat.shape if need_proj else 0)
    native.call(
        "ovseg_spatial_aggregation_attention_bwd", tokens, native.aligned(flat @ proj_weight), grad_tokens,
        attended if need_proj else None, *x.shape, heads, window, shift,
    )  # fmt: skip
    if need_q:
        grads[1] = grad_tokens[:, :, :, 0].sum(1)
    if need_k:
        grads[2] = grad_tokens[:, :, :, 1].sum(1)
    if need_v_bias:
        grads[6] = grad_tokens[:, :, :, 2].sum((0, 1, 2))
    if need_proj:
        grads[7] = flat.t() @ attended
    grad_tokens = grad_tokens.view(-1, 3 * channels)
    if need_qkv:
        grads[5] = grad_tokens.t() @ normed
    if need_x or need_gain or need_offset:
        x_grad, grads[3], grads[4] = layer_norm_backward(
            grad_tokens @ qkv_weight, rows, mean, scale, norm_weight, norm_bias, [need_x, need_gain, need_offset]
        )
        if need_x:
            grads[0] = (x_grad + flat).view(x.shape)
    return grads
