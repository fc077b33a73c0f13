"""Cost embedding: a convolution over every class's cost map, from P prompts to C channels.

embedding[b, t] = weight ∗ cost[b, t] + bias,    cost = cost_volume(image, text)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .common import registration
from .common.checks import check_positive, check_tensors
from .cost_volume import check_cost_inputs
from .cost_volume import torch_form as cosines

LARGEST = 11  # K of the kernels: a pixel's window has to fit into the 128 costs of a tile and its halo


def cost_embedding(image: Tensor, text: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Cosine cost volume and its convolutional embedding (CAT-Seg, section 3.2).

    Args:
        image: (B, H, W, E) dense image embeddings, any length.
        text: (T, P, E) text embeddings, any length.
        weight: (C, P, K, K) convolution over each class's map with padding K // 2; K is odd (7 as published).
        bias: (C,).

    Returns:
        (B, T, H, W, C) channels-last tokens.

    Raises:
        TypeError, ValueError: as `cost_volume`; or the kernel is even or its input channels are not P.
    """
    check_cost_inputs("cost_embedding", image, text, weight=(weight, "C P K K"), bias=(bias, "C"))
    size = _kernel_size(weight)
    large = f"its window of {size} × {size} is larger than {LARGEST} × {LARGEST}" if size > LARGEST else None
    backend = backends.choose("cost_embedding", image, text, weight, bias, refusals={"cuda": large, "triton": large})
    if backend == "torch":
        return torch_form(image, text, weight, bias)
    return torch.ops.ovseg_fast.cost_embedding(*registration.autocast(image, text, weight, bias), backend)


def torch_form(image: Tensor, text: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `cost_embedding`."""
    return embed_volume(cosines(image, text).permute(0, 1, 3, 4, 2), weight, bias)


def embed_volume(volume: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution of `cost_embedding` on an existing cost volume (B, T, H, W, P)."""
    check_tensors("cost_embedding", volume=(volume, "B T H W P"), weight=(weight, "C P K K"), bias=(bias, "C"))
    batch, classes, height, width, prompts = volume.shape
    check_positive("cost_embedding", T=classes, H=height, W=width, P=prompts)
    padding = _kernel_size(weight) // 2
    maps = volume.permute(0, 1, 4, 2, 3).reshape(batch * classes, prompts, height, width)
    maps = maps.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    embedded = F.conv2d(maps, weight, bias, padding=padding)
    return embedded.permute(0, 2, 3, 1).reshape(batch, classes, height, width, bias.shape[0])


def _kernel_size(weight: Tensor) -> int:
    if weight.shape[-1] % 2 == 0:
        raise ValueError(f"cost_embedding: weight must have an odd kernel size, got {weight.shape[-1]}.")
    return weight.shape[-1]


def _backward(
    kernels: Any, grad: Tensor, image: Tensor, text: Tensor, weight: Tensor, bias: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """Recomputes the cost volume and stores it, as it stores its gradient: each is 1 / C of `grad`."""
    cost = kernels.cost_volume(image, text)
    grads: list[Tensor | None] = [None] * 4
    if any(needs[:2]):
        grads[:2] = kernels.cost_volume_backward(kernels.cost_gradient(grad, weight), cost, image, text, needs[:2])
    if any(needs[2:]):
        grads[2:] = kernels.weight_gradient(grad, cost, weight)
    return grads


registration.define(
    "cost_embedding(Tensor image, Tensor text, Tensor weight, Tensor bias) -> Tensor",
    "cost_embedding",
    lambda image, text, _, bias: image.new_empty(image.shape[0], text.shape[0], *image.shape[1:3], bias.shape[0]),
    backward=_backward,
)
