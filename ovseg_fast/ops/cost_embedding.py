"""Cost embedding: a convolution over every class's cost map, from P prompts to C channels.

embedding[b, t] = weight ∗ cost[b, t] + bias,    cost = cost_volume(image, text)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_positive, check_tensors
from .cost_volume import check_cost_inputs, cost_volume


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
    return embed_volume(cost_volume(image, text), weight, bias)


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
