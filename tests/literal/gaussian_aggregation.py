"""Neighbourhood Gaussian Aggregation of Cascade-CLIP (arXiv 2406.00670)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gaussian_weights(layers: int, sigma: float = 1.0) -> Tensor:
    """Initial weights exp(−d² / 2σ²), d the distance to the stage's last layer: (layers,)."""
    distance = torch.arange(layers - 1, -1, -1, dtype=torch.float32)
    return torch.exp(-0.5 * (distance / sigma) ** 2)


def gaussian_aggregation(features: Sequence[Tensor], layer_weights: Tensor) -> Tensor:
    """Σ_l w_l · f_l: L maps (B, E, H, W) and their learned weights (L,), not normalised -> (B, E, H, W)."""
    if len(features) != len(layer_weights):
        raise ValueError(f"layer_weights has {len(layer_weights)} entries, expected {len(features)}")
    total = layer_weights[0] * features[0]
    for w, f in zip(layer_weights[1:], features[1:], strict=True):
        total = total + w * f
    return total
