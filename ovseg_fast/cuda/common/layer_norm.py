"""Backward of the layer norm in front of the attention kernels."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-5  # torch.nn.functional.layer_norm


def layer_norm_backward(
    grad: Tensor, rows: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of rows (N, C), weight and bias, from that of the result; None if not needed. `mean` and `scale` are
    those of `torch.native_layer_norm`, (N, 1)."""
    grads: list[Tensor | None] = [None] * 3
    if needs[0]:
        grads[0] = torch.ops.aten.native_layer_norm_backward(
            grad, rows, rows.shape[1:], mean, scale, weight, bias, [True, False, False]
        )[0]
    # PyTorch's own sums over the rows are bfloat16 on a CPU.
    if needs[1]:
        grads[1] = ((rows - mean.float()) * scale.float() * grad).sum(0).to(weight.dtype)
    if needs[2]:
        grads[2] = grad.sum(0)
    return grads
