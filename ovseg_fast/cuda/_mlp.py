"""The residual MLP's backward beside the CUDA C++ kernels: PyTorch's own products and normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5  # torch.nn.functional.layer_norm


def residual_mlp_backward(
    grad: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, fc1_weight: Tensor, fc1_bias: Tensor,
    fc2_weight: Tensor, activation: str, need_x: bool, need_sums: bool, need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, the norm's weight and bias, W₁, b₁, W₂ and b₂; an empty tensor where none is needed."""
    channels = x.shape[-1]
    empty = x.new_empty(0)
    rows, flat = x.reshape(-1, channels), grad.reshape(-1, channels)
    normed, mean, scale = torch.native_layer_norm(rows, (channels,), norm_weight, norm_bias, EPS)
    units = F.linear(normed, fc1_weight, fc1_bias)
    units_grad = flat @ fc2_weight
    if activation == "gelu":
        units_grad = torch.ops.aten.gelu_backward(units_grad, units)
    else:
        units_grad = torch.where(units > 0, units_grad, 0)
    grads = [empty] * 7
    if need_weights:
        activated = getattr(F, activation)(units)
        grads[3:6] = units_grad.t() @ normed, units_grad.sum(0), flat.t() @ activated
    if need_sums:
        grads[6] = flat.sum(0)
    if need_x or need_sums:
        x_grad, weight_grad, bias_grad = torch.ops.aten.native_layer_norm_backward(
            units_grad @ fc1_weight, rows, (channels,), mean, scale, norm_weight, norm_bias,
            [need_x, need_sums, need_sums],
        )  # fmt: skip
        if need_x:
            grads[0] = (x_grad + flat).view(x.shape)
        if need_sums:
            grads[1:3] = weight_grad, bias_grad
    return tuple(grads)
