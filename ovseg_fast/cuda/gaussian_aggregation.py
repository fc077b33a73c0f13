"""Launchers of `csrc/gaussian_aggregation.cu`, and of the gather whose layers are summed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from .layer_gather import gather, gather_backward

BLOCK, SHARES = 16384, 8  # bytes of a layer's map that a block of the backward works on, and sums that it leaves


def gaussian_aggregation(features: Tensor, weights: Tensor) -> Tensor:
    """(L, B, S, E) and (L,) -> (B, S, E)."""
    out = features.new_empty(features.shape[1:])
    native.call(
        "ovseg_gaussian_aggregation_fwd", native.aligned(features), native.aligned(weights), out,
        len(features), out.numel(),
    )  # fmt: skip
    return out


def gaussian_aggregation_backward(
    grad: Tensor, features: Tensor, weights: Tensor, need_features: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of features and weights; an empty tensor where none is needed."""
    layers, size = len(features), grad.numel()
    count = SHARES * -(-size * grad.element_size() // BLOCK)
    features_grad = features.new_empty(features.shape) if need_features else None
    weights_grad = weights.new_empty(layers) if need_weights else None
    shares = features.new_empty(layers, count, dtype=torch.float32) if need_weights else None
    native.call(
        "ovseg_gaussian_aggregation_bwd", native.aligned(grad), native.aligned(features), native.aligned(weights),
        features_grad, weights_grad, shares, layers, size, count,
    )  # fmt: skip
    empty = features.new_empty(0)
    return empty if features_grad is None else features_grad, empty if weights_grad is None else weights_grad


def gather_stage(
    hidden: Sequence[Tensor], patches: int, shared_weight: Tensor, shared_bias: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, projection: Tensor, weights: Tensor, shared_eps: float, norm_eps: float,
) -> Tensor:  # fmt: skip
    """L tensors (B, N, D), (D,) twice, (L, D) twice, (L, D, E) and (L,) -> (B, S, E)."""
    out = hidden[0].new_empty(len(hidden[0]), patches, projection.shape[-1])
    gather(
        hidden, patches, shared_weight, shared_bias, norm_weight, norm_bias, projection, weights, out,
        shared_eps, norm_eps,
    )  # fmt: skip
    return out


def gather_stage_backward(
    grad: Tensor, hidden: Sequence[Tensor], patches: int, shared_weight: Tensor, shared_bias: Tensor,
    norm_weight: Tensor, norm_bias: Tensor, projection: Tensor, weights: Tensor, shared_eps: float, norm_eps: float,
    need_hidden: bool, need_norms: bool, need_projection: bool, need_weights: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the hidden states (L, B, N, D), the five parameters and the weights; empty where none is needed."""
    return gather_backward(
        grad, hidden, patches, shared_weight, shared_bias, norm_weight, norm_bias, projection, weights,
        shared_eps, norm_eps, need_hidden, need_norms, need_projection, need_weights,
    )  # fmt: skip
