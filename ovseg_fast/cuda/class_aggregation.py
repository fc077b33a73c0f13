"""Launchers of `csrc/class_aggregation.cu`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from .common.layer_norm import EPS, layer_norm_backward
from .common.residual_mlp import residual_mlp_backward as residual_mlp_backward


def class_aggregation(x: Tensor, terms: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """(B, T, H, W, C) -> the same, and what the attention half gives, (B, T, H // pooling, W // pooling, C), empty
    unless `keep`; `others`: weights, pads, heads, pooling, full, keep."""
    *weights, pads, heads, pooling, full, keep = others
    if full:
        raise NotImplementedError("the CUDA C++ kernels take linear attention only")
    batch, classes, height, width, channels = x.shape
    y = x.new_empty(batch, classes, height // pooling, width // pooling, channels)
    middle = x.new_empty(y.shape if keep else 0)
    hidden = len(weights[-3])  # b₁
    native.call(
        "ovseg_class_aggregation_fwd", x, terms, *weights, y, middle if keep else None,
        *x.shape, hidden, heads, pooling, pads, len(terms),
    )  # fmt: skip
    if pooling == 1:  # x is added already
        return y, middle
    out = x.new_empty(x.shape)
    native.call("ovseg_class_aggregation_resize_fwd", x, y, out, batch * classes, height, width, *y.shape[2:])
    return out, middle


def class_attention_backward(
    grad: Tensor, x: Tensor, terms: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, v_bias: Tensor,
    padding_token: Tensor, pads: int, heads: int, pooling: int, full: bool,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Gradients (dq', dk', dv) of all tokens, (tokens, or one more if there are pads, 3C); (dk', dv) of the padding
    class, (B, positions, 2C), empty without pads; n; tokens, mean and scale of the norm."""
    batch, classes, *_, channels = x.shape
    rows = (x if pooling == 1 else _squares(x, pooling).mean((3, 5))).reshape(-1, channels)
    if pads:
        rows = torch.cat([rows, padding_token.unsqueeze(0)])
    normed, mean, scale = torch.native_layer_norm(rows, (channels,), norm_weight, norm_bias, EPS)
    positions = grad.shape[2] * grad.shape[3]
    projected = F.linear(normed, weight)
    tokens_grad = torch.empty_like(projected)
    pad_grads = x.new_empty(batch, positions if pads else 0, 2 * channels, dtype=torch.float32)
    native.call(
        "ovseg_class_aggregation_attention_bwd", projected, terms, v_bias, grad, tokens_grad,
        pad_grads if pads else None, batch, classes, positions, channels, heads, pads, len(terms),
    )  # fmt: skip
    return tokens_grad, pad_grads, normed, (rows, mean, scale)


def tokens_backward(
    normed_grad: Tensor, grad: Tensor, x: Tensor, padding: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    statistics: tuple[Tensor, ...], pads: int, pooling: int, parameters: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of x, with the residual's, of the norm's weight and bias, if `parameters`, and of the padding class,
    from those of n and y."""
    rows, mean, scale = statistics
    needs = [True, parameters, parameters]
    rows_grad, gain, offset = layer_norm_backward(normed_grad, rows, mean, scale, norm_weight, norm_bias, needs)
    assert rows_grad is not None
    tokens = grad.numel() // grad.shape[-1]
    padding_grad = rows_grad[tokens].clone() if pads else torch.zeros_like(padding)
    x_grad = rows_grad[:tokens].view(grad.shape) + grad
    if pooling > 1:
        pooled_grad, x_grad = x_grad, x.new_zeros(x.shape)
        _squares(x_grad, pooling).copy_((pooled_grad / pooling**2)[:, :, :, None, :, None])
    return x_grad, gain, offset, padding_grad


def resize_backward(grad: Tensor, low_height: int, low_width: int) -> Tensor:
    """Gradient of the smaller maps that are resized and added."""
    batch, classes, height, width, channels = grad.shape
    out = grad.new_empty(batch, classes, low_height, low_width, channels)
    native.call(
        "ovseg_class_aggregation_resize_bwd", grad, out,
        batch * classes, height, width, low_height, low_width, channels,
    )  # fmt: skip
    return out


def _squares(x: Tensor, pooling: int) -> Tensor:
    """(B, T, H // pooling, pooling, W // pooling, pooling, C), a view."""
    high, wide = x.shape[2] // pooling, x.shape[3] // pooling
    whole = x[:, :, : high * pooling, : wide * pooling]
    return whole.unflatten(3, (wide, pooling)).unflatten(2, (high, pooling))
