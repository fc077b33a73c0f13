"""Launcher of `csrc/residual_mlp_backward.cu`, the backward of the MLP that both aggregation kernels end with."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native

EPS = 1e-5  # torch.nn.functional.layer_norm


def residual_mlp_backward(
    grad: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, fc1_weight: Tensor, fc1_bias: Tensor,
    fc2_weight: Tensor, activation: str, need_x: bool, need_sums: bool, need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, the norm's weight and bias, W₁, b₁, W₂ and b₂; an empty tensor where none is needed."""
    channels, hidden = x.shape[-1], fc1_weight.shape[0]
    rows = x.numel() // channels
    x_grad = x.new_empty(x.shape if need_x else 0)
    normed = x.new_empty(rows * need_weights, channels)
    activated, units_grad = (x.new_empty(rows * need_weights, hidden) for _ in range(2))
    blocks = -(-rows // (128 if x.element_size() == 2 else 64))
    sums = x.new_empty(blocks * need_sums, 3, channels, dtype=torch.float32)
    inputs = (grad, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight)
    outputs = [(x_grad, need_x), (normed, need_weights), (activated, need_weights), (units_grad, need_weights)]
    native.call(
        "ovseg_residual_mlp_bwd", *map(native.aligned, inputs),
        *(tensor if needed else None for tensor, needed in (*outputs, (sums, need_sums))),
        rows, channels, hidden, activation == "gelu",
    )  # fmt: skip
    weight_grads = [x.new_empty(0) for _ in range(3)]
    if need_weights:
        flat = grad.reshape(-1, channels)
        weight_grads = [units_grad.t() @ normed, units_grad.sum(0), flat.t() @ activated]
    fc1, fc1_bias_grad, fc2 = weight_grads
    gain, offset, bias = (part.sum(0).to(x.dtype) if need_sums else x.new_empty(0) for part in sums.unbind(1))
    return x_grad, gain, offset, fc1, fc1_bias_grad, fc2, bias
