"""Launchers of `csrc/gaussian_aggregation.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native

BLOCK, PARTIAL_SUMS = 16384, 8  # bytes of a layer's map per block of the backward, and the sums that a block stores


def gaussian_aggregation(features: Tensor, weights: Tensor) -> Tensor:
    """(L, B, S, E) and (L,) -> (B, S, E)."""
    out = features.new_empty(features.shape[1:])
    native.call("ovseg_gaussian_aggregation_fwd", features, weights, out, len(features), out.numel())
    return out


def gaussian_aggregation_backward(
    grad: Tensor, features: Tensor, weights: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of features and weights."""
    layers, size = len(features), grad.numel()
    count = PARTIAL_SUMS * -(-size * grad.element_size() // BLOCK)
    features_grad = torch.empty_like(features) if needs[0] else None
    weights_grad = torch.empty_like(weights) if needs[1] else None
    sums = features.new_empty(layers, count, dtype=torch.float32) if needs[1] else None
    native.call(
        "ovseg_gaussian_aggregation_bwd", grad, features, weights, features_grad, weights_grad, sums,
        layers, size, count,
    )  # fmt: skip
    return [features_grad, weights_grad]
