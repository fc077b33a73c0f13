"""The second half of both aggregation blocks: x + W₂ · act(W₁ LN(x) + b₁) + b₂."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

KERNEL_CHANNELS = 256  # a kernel's program holds whole rows


def residual_mlp(x: Tensor, *weights: Tensor, activation: str) -> Tensor:
    """The PyTorch form, (..., C) -> the same: weight and bias of LN, W₁ and W₂; activation "gelu" (exact) or "relu"."""
    norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    normed = F.layer_norm(x, (x.shape[-1],), norm_weight, norm_bias)
    return x + F.linear(getattr(F, activation)(F.linear(normed, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def mlp_refusal(x: Tensor, fc1_weight: Tensor) -> str | None:
    """Why the Triton kernels cannot run an MLP of these sizes, x (..., C) and fc1_weight (M, C); None if they can."""
    if x.shape[-1] > KERNEL_CHANNELS:
        return f"its MLP's kernels take up to {KERNEL_CHANNELS} channels, not {x.shape[-1]}"
    if fc1_weight.numel() >= 2**31:
        return f"its MLP's kernels take weights of less than 2^31 elements, not {fc1_weight.numel()}"
    return None


def mlp_backward(
    kernels: Any, grad: Tensor, x: Tensor, weights: Sequence[Tensor], activation: str, need_x: bool, needs: list[bool]
) -> list[Any]:
    """Gradients of x and, by `needs`, of the six weights: the launcher computes sums over rows (norm, b₂) and
    products (W₁, b₁, W₂) only if they are needed."""
    need_gain, need_offset, *need_products, need_fc2_bias = needs
    need_sums = need_gain or need_offset or need_fc2_bias
    *inputs, _ = weights  # b₂ takes no part in any gradient
    return list(kernels.residual_mlp_backward(grad, x, *inputs, activation, need_x, need_sums, any(need_products)))
