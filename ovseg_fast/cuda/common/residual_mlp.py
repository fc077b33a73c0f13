"""Launcher of `csrc/residual_mlp_backward.cu`, the backward of the MLP that both aggregation kernels end with."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native


def residual_mlp_backward(
    grad: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, fc1_weight: Tensor, fc1_bias: Tensor,
    fc2_weight: Tensor, activation: str, need_x: bool, need_sums: bool, need_weights: bool,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of x, the norm's weight and bias, W₁, b₁, W₂ and b₂; None if not needed."""
    hidden, channels = fc1_weight.shape
    rows = x.numel() // channels
    x_grad = x.new_empty(x.shape) if need_x else None
    normed = activated = units_grad = sums = None
    if need_weights:
        normed, activated, units_grad = (x.new_empty(rows, width) for width in (channels, hidden, hidden))
    if need_sums:
        sums = x.new_empty(-(-rows // (128 if x.element_size() == 2 else 64)), 3, channels, dtype=torch.float32)
    native.call(
        "ovseg_residual_mlp_bwd", grad, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight,
        x_grad, normed, activated, units_grad, sums, rows, channels, hidden, activation == "gelu",
    )  # fmt: skip
    fc1 = fc1_bias_grad = fc2 = gain = offset = bias = None
    if normed is not None and activated is not None and units_grad is not None:
        fc1, fc1_bias_grad = units_grad.t() @ normed, units_grad.sum(0)
        fc2 = grad.view(-1, channels).t() @ activated
    if sums is not None:
        gain, offset, bias = (part.sum(0).to(x.dtype) for part in sums.unbind(1))
    return [x_grad, gain, offset, fc1, fc1_bias_grad, fc2, bias]
