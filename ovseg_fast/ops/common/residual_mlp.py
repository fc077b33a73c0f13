"""The feed-forward half of both aggregation blocks: x + W₂ · act(W₁ LN(x) + b₁) + b₂."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import legacy, registration

KERNEL_CHANNELS = 256  # a kernel's program holds whole rows


def residual_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    activation: str,
    backend: str,
) -> Tensor:
    """(..., C) -> the same; `activation` is `"gelu"` (exact) or `"relu"`."""
    if backend == "torch":
        normed = F.layer_norm(x, (x.shape[-1],), norm_weight, norm_bias)
        return x + F.linear(getattr(F, activation)(F.linear(normed, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
    tensors = registration.autocast(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return torch.ops.ovseg_fast.residual_mlp(*tensors, activation, backend)


def mlp_refusal(x: Tensor, fc1_weight: Tensor) -> str | None:
    """Why the kernels do not take an MLP of these sizes, x (..., C) and fc1_weight (M, C); None where they do."""
    if x.shape[-1] > KERNEL_CHANNELS:
        return f"its MLP's kernels take up to {KERNEL_CHANNELS} channels, not {x.shape[-1]}"
    if fc1_weight.numel() >= 2**31:
        return f"its MLP's kernels take weights of less than 2^31 elements, not {fc1_weight.numel()}"
    return None


# --- kernels ---


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    activation: str,
    need_x: bool,
    need_sums: bool,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    needed = (need_x, need_sums, need_sums, need_weights, need_weights, need_weights, need_sums)
    like = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, norm_bias)
    return tuple(x.new_empty(tensor.shape if need else 0) for tensor, need in zip(like, needed, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.activation, ctx.backend = inputs  # b₂ takes no part in any gradient
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:7]
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = needed
    gradients = torch.ops.ovseg_fast.residual_mlp_backward(
        grad,
        *ctx.saved_tensors,
        ctx.activation,
        x,
        norm_weight or norm_bias or fc2_bias,
        fc1_weight or fc1_bias or fc2_weight,
        ctx.backend,
    )
    return *(gradient if need else None for gradient, need in zip(gradients, needed, strict=True)), None, None


legacy.define(
    "residual_mlp(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor fc1_bias, "
    "Tensor fc2_weight, Tensor fc2_bias, str activation, str backend) -> Tensor",
    "common.residual_mlp",
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)
legacy.define(
    "residual_mlp_backward(Tensor grad, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, "
    "Tensor fc1_bias, Tensor fc2_weight, str activation, bool need_x, bool need_sums, bool need_weights, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "common.residual_mlp",
    _backward_fake,
)
