"""What both aggregation blocks share: checks, the joint weight of queries, keys and values, the MLP's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import check_heads, check_positive, check_tensors

Prepare = Callable[..., Tensor]  # (function, *tensors) -> function(*tensors), perhaps remembered from an earlier call

SHAPES = {
    **dict.fromkeys(("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias", "padding_token"), "C"),
    **dict.fromkeys(("q_bias", "k_bias", "v_bias", "proj_bias", "fc2_bias"), "C"),
    **dict.fromkeys(("q_weight", "k_weight"), "C C+G"),
    **dict.fromkeys(("v_weight", "proj_weight"), "C C"),
    "fc1_weight": "M C",
    "fc1_bias": "M",
    "fc2_weight": "C M",
    "padding_guidance": "G",
}


def check_block(
    operator: str, kind: Any, x: Tensor, guidance: Tensor, guidance_shape: str, weights: Any, heads: int
) -> None:
    """Check what both blocks take: x (B, T, H, W, C), guidance and the weights, a NamedTuple of type `kind`."""
    if not isinstance(weights, kind):
        raise TypeError(f"{operator}: weights must be {kind.__name__}, got {type(weights).__name__}.")
    named = {name: (tensor, SHAPES[name]) for name, tensor in zip(kind._fields, weights, strict=True)}
    check_tensors(operator, x=(x, "B T H W C"), guidance=(guidance, guidance_shape), **named)
    _, classes, height, width, channels = x.shape
    check_positive(operator, T=classes, H=height, W=width)
    check_heads(operator, heads, channels)
    columns, got = channels + guidance.shape[-1], weights.q_weight.shape[1]
    if got != columns:
        raise ValueError(f"{operator}: q_weight must have C + G = {columns} columns, got {got}.")


def prepare_now(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A `Prepare` that remembers nothing."""
    return function(*tensors)


def joint_weight(q_weight: Tensor, k_weight: Tensor, v_weight: Tensor) -> Tensor:
    """What reads x in all three projections: (3C, C)."""
    channels = len(v_weight)
    return torch.cat([q_weight[:, :channels], k_weight[:, :channels], v_weight])


def mlp_weights(weights: Any) -> tuple[Tensor, ...]:
    """The weights of `residual_mlp`, in its order."""
    fc1, fc2 = (weights.fc1_weight, weights.fc1_bias), (weights.fc2_weight, weights.fc2_bias)
    return (weights.norm2_weight, weights.norm2_bias, *fc1, *fc2)


def need_gradient(*tensors: Tensor) -> bool:
    """Whether a backward pass may follow, which reads what the attention half gave."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def cpu_refusal(channels: int, heads: int, hidden: int) -> str | None:
    """Why the CPU kernels, which read 16 numbers at a time, do not take these sizes; None if they do."""
    if channels % 16 == 0 and channels // heads % 16 == 0 and hidden % 16 == 0:
        return None
    taken = "its CPU kernel takes channels, channels of a head and hidden units in multiples of 16"
    if torch.compiler.is_compiling():
        return taken  # sizes may be symbols
    return f"{taken}, not {channels} channels in {heads} heads and {hidden} hidden units"
