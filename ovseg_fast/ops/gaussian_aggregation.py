"""Neighbourhood Gaussian aggregation: a stage's map is the weighted sum of its layers' maps.

    out = Σ_l w_l · f_l,    w_l learned, initialised to exp(−½ d_l²) with d_l the distance to the stage's last layer

The weights are not normalised and the sum is not scaled back to unit length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_positive, check_tensors


def gaussian_aggregation(features: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over the layers of a stage (Cascade-CLIP, section 3.3, equation 4).

    Args:
        features: (L, B, S, E) maps of L neighbouring layers, as `layer_gather` gives them.
        weights: (L,) learned Gaussian weights.

    Returns:
        (B, S, E).

    Raises:
        TypeError, ValueError: dtype, device or shapes do not fit, or there is no layer.
    """
    check_tensors("gaussian_aggregation", features=(features, "L B S E"), weights=(weights, "L"))
    check_positive("gaussian_aggregation", L=features.shape[0])
    return torch.einsum("lbse,l->bse", features, weights)


def gaussian_weights(layers: int, sigma: float = 1.0) -> Tensor:
    """(L,) float32 initial weights exp(−d² / 2σ²), d = L−1 … 0 the distance to the stage's last layer."""
    distance = torch.arange(layers - 1, -1, -1, dtype=torch.float32)
    return torch.exp(-0.5 * (distance / sigma) ** 2)
