"""Neighbourhood Gaussian aggregation: a stage's map is the weighted sum of its layers' maps.

    out = Σ_l w_l · f_l,    w_l learned, initialised to exp(−½ d_l²) with d_l the distance to the stage's last layer

The weights are not normalised and the sum is not scaled back to unit length. `layer_gather` computes it without storing
the layers' maps; this operator is for features that exist already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .common import registration
from .common.checks import check_positive, check_tensors


def gaussian_aggregation(features: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over the layers of a stage (Cascade-CLIP, section 3.3, equation 4).

    Args:
        features: (L, B, S, E) maps of L neighbouring layers, as `layer_gather` returns them.
        weights: (L,) learned Gaussian weights.

    Returns:
        (B, S, E).

    Raises:
        TypeError, ValueError: dtype, device or shapes do not fit, or there is no layer.
    """
    check_tensors("gaussian_aggregation", features=(features, "L B S E"), weights=(weights, "L"))
    check_positive("gaussian_aggregation", L=features.shape[0])
    backend = backends.choose("gaussian_aggregation", features, weights)
    if backend == "torch":
        return torch_form(features, weights)
    return torch.ops.ovseg_fast.gaussian_aggregation(*registration.autocast(features, weights), backend)


def torch_form(features: Tensor, weights: Tensor) -> Tensor:
    """(L, B, S, E) and (L,) -> (B, S, E)."""
    return torch.einsum("lbse,l->bse", features, weights)


def gaussian_weights(layers: int) -> Tensor:
    """(L,) float32 initial weights exp(−½ d²), d = L−1 … 0 the distance to the stage's last layer."""
    distance = torch.arange(layers - 1, -1, -1, dtype=torch.float32)
    return torch.exp(-0.5 * distance**2)


# Kernels: features (L, B, S, E) and weights (L,) -> (B, S, E).
registration.define(
    "gaussian_aggregation(Tensor features, Tensor weights) -> Tensor",
    "gaussian_aggregation",
    lambda features, weights: features.new_empty(features.shape[1:]),
)
