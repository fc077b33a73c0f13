"""Cost embedding: a convolution over every class's cost map, from P prompts to C channels.

embedding[b, t] = weight ∗ cost[b, t] + bias,    cost = cost_volume(image, text)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .common import legacy, registration
from .common.checks import check_positive, check_tensors
from .cost_volume import check_cost_inputs, cost_volume

LARGEST = 11  # K of the kernels: a pixel's window has to fit into the 128 costs of a tile and its halo


def cost_embedding(image: Tensor, text: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Cosine cost volume and its convolutional embedding (CAT-Seg, section 3.2).

    Args:
        image: (B, H, W, E) dense image embeddings, any length.
        text: (T, P, E) or (B, T, P, E) text embeddings, any length.
        weight: (C, P, K, K) convolution over each class's map with padding K // 2; K is odd (7 as published).
        bias: (C,).

    Returns:
        (B, T, H, W, C) channels-last tokens.

    Raises:
        TypeError, ValueError: as `cost_volume`; or the kernel is even or its input channels are not P.
    """
    check_cost_inputs("cost_embedding", image, text, weight=(weight, "C P K K"), bias=(bias, "C"))
    _check_kernel(weight)
    size = weight.shape[-1]
    large = f"its window of {size} × {size} is larger than {LARGEST} × {LARGEST}" if size > LARGEST else None
    backend = backends.choose("cost_embedding", image, text, weight, bias, refusals={"cuda": large, "triton": large})
    if backend == "torch":
        with backends.backend("torch"):
            return embed_volume(cost_volume(image, text), weight, bias)
    return torch.ops.ovseg_fast.cost_embedding(*registration.autocast(image, text, weight, bias), backend)


def embed_volume(volume: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution of `cost_embedding` on a cost volume (B, T, H, W, P) that is at hand already."""
    check_tensors("cost_embedding", volume=(volume, "B T H W P"), weight=(weight, "C P K K"), bias=(bias, "C"))
    batch, classes, height, width, prompts = volume.shape
    check_positive("cost_embedding", T=classes, H=height, W=width, P=prompts)
    _check_kernel(weight)
    maps = volume.permute(0, 1, 4, 2, 3).reshape(batch * classes, prompts, height, width)
    maps = maps.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    embedded = F.conv2d(maps, weight, bias, padding=weight.shape[-1] // 2)
    return embedded.permute(0, 2, 3, 1).reshape(batch, classes, height, width, bias.shape[0])


def _check_kernel(weight: Tensor) -> None:
    if weight.shape[-1] % 2 == 0:
        raise ValueError(f"cost_embedding: weight must have an odd kernel size, got {weight.shape[-1]}.")


# --- kernels: image (B, H, W, E), text (T, P, E) or (B, T, P, E), weight (C, P, K, K), bias (C,) -> (B, T, H, W, C) ---


def _fake(image: Tensor, text: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    batch, height, width = image.shape[:3]
    return image.new_empty(batch, text.shape[-3], height, width, bias.shape[0])


def _backward_fake(
    grad: Tensor, image: Tensor, text: Tensor, weight: Tensor, need_image: bool, need_text: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        image.new_empty(image.shape if need_image else 0),
        text.new_empty(text.shape if need_text else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[:1] if need_weight else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, str], output: Tensor) -> None:
    image, text, weight, _, ctx.backend = inputs
    ctx.save_for_backward(image, text, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_image, need_text, need_weight, need_bias, _ = ctx.needs_input_grad
    gradients = torch.ops.ovseg_fast.cost_embedding_backward(
        grad, *ctx.saved_tensors, need_image, need_text, need_weight or need_bias, ctx.backend
    )
    return *(part if need else None for part, need in zip(gradients, ctx.needs_input_grad, strict=False)), None


legacy.define(
    "cost_embedding(Tensor image, Tensor text, Tensor weight, Tensor bias, str backend) -> Tensor",
    "cost_embedding",
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)
legacy.define(
    "cost_embedding_backward(Tensor grad, Tensor image, Tensor text, Tensor weight, bool need_image, bool need_text, "
    "bool need_weight, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    "cost_embedding",
    _backward_fake,
)
