"""Neighbourhood Gaussian aggregation: a stage's map is the weighted sum of its layers' maps.

    out = Σ_l w_l · f_l,    w_l learned, initialised to exp(−½ d_l²) with d_l the distance to the stage's last layer

The weights are not normalised and the sum is not scaled back to unit length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .common import legacy, registration
from .common.checks import check_positive, check_tensors
from .layer_gather import (
    EPSILONS,
    PARAMETERS,
    check_gather_inputs,
    gather_backward_fake,
    gather_gradients,
    gather_layers,
    gather_refusals,
    setup_gather_context,
)


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
    backend = backends.choose("gaussian_aggregation", features, weights)
    if backend == "torch":
        return torch.einsum("lbse,l->bse", features, weights)
    return torch.ops.ovseg_fast.gaussian_aggregation(*registration.autocast(features, weights), backend)


def gather_stage(
    hidden: Sequence[Tensor],
    patches: int,
    shared_weight: Tensor,
    shared_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    projection: Tensor,
    weights: Tensor,
    *,
    shared_eps: float = 1e-6,
    norm_eps: float = 1e-5,
) -> Tensor:
    """`gaussian_aggregation` of what `layer_gather` gives; kernels keep no single layer's map for it.

    Args:
        hidden, patches, shared_weight, shared_bias, norm_weight, norm_bias, projection, shared_eps, norm_eps: as
            `layer_gather` takes them, of the L layers of one stage.
        weights: (L,) learned Gaussian weights.

    Returns:
        (B, S, E).

    Raises:
        TypeError, ValueError: as `layer_gather`, or there is not one weight a layer.
    """
    parameters = (shared_weight, shared_bias, norm_weight, norm_bias, projection)
    check_gather_inputs("gather_stage", hidden, patches, *parameters, weights=(weights, "L"))
    backend = backends.choose(
        "gaussian_aggregation", *hidden, *parameters, weights, refusals=gather_refusals(projection)
    )
    if backend == "torch":
        features = gather_layers(hidden, patches, *parameters, shared_eps, norm_eps)
        return torch.einsum("lbse,l->bse", features, weights)
    tensors = registration.autocast(*hidden, *parameters, weights)
    layers, rest = list(tensors[: len(hidden)]), tensors[len(hidden) :]
    return torch.ops.ovseg_fast.gather_stage(layers, patches, *rest, shared_eps, norm_eps, backend)


def gaussian_weights(layers: int, sigma: float = 1.0) -> Tensor:
    """(L,) float32 initial weights exp(−d² / 2σ²), d = L−1 … 0 the distance to the stage's last layer."""
    distance = torch.arange(layers - 1, -1, -1, dtype=torch.float32)
    return torch.exp(-0.5 * (distance / sigma) ** 2)


# --- kernels: features (L, B, S, E), weights (L,) -> (B, S, E) ---


def _fake(features: Tensor, weights: Tensor) -> Tensor:
    return features.new_empty(features.shape[1:])


def _backward_fake(
    grad: Tensor, features: Tensor, weights: Tensor, need_features: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    return (
        features.new_empty(features.shape if need_features else 0),
        features.new_empty(weights.shape if need_weights else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    need_features, need_weights, _ = ctx.needs_input_grad
    features, weights = torch.ops.ovseg_fast.gaussian_aggregation_backward(
        grad, *ctx.saved_tensors, need_features, need_weights, ctx.backend
    )
    return features if need_features else None, weights if need_weights else None, None


legacy.define(
    "gaussian_aggregation(Tensor features, Tensor weights, str backend) -> Tensor",
    "gaussian_aggregation",
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)
legacy.define(
    "gaussian_aggregation_backward(Tensor grad, Tensor features, Tensor weights, bool need_features, "
    "bool need_weights, str backend) -> (Tensor, Tensor)",
    "gaussian_aggregation",
    _backward_fake,
)


# --- kernels: the arguments of `gather_stage`; the backward gives the L hidden states' gradients as (L, B, N, D) ---


def _stage_fake(hidden: Sequence[Tensor], patches: int, *rest: Any) -> Tensor:
    projection = rest[4]
    return hidden[0].new_empty(hidden[0].shape[0], patches, projection.shape[-1])


def _stage_backward_fake(grad: Tensor, hidden: Sequence[Tensor], patches: int, *rest: Any) -> tuple[Tensor, ...]:
    *parameters, weights, _, _, need_hidden, need_norms, need_projection, need_weights = rest
    return (
        *gather_backward_fake(hidden, parameters, need_hidden, need_norms, need_projection),
        hidden[0].new_empty(weights.shape if need_weights else 0),
    )


def _stage_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    hidden, parameters = ctx.saved_tensors[: ctx.layers], ctx.saved_tensors[ctx.layers :]
    need_hidden, _, *needs = ctx.needs_input_grad
    gradients = torch.ops.ovseg_fast.gather_stage_backward(
        grad,
        list(hidden),
        ctx.patches,
        *parameters,
        ctx.shared_eps,
        ctx.norm_eps,
        any(need_hidden),
        any(needs[:4]),
        needs[4],
        needs[5],
        ctx.backend,
    )
    return *gather_gradients(ctx, gradients), None


legacy.define(
    f"gather_stage({PARAMETERS}, Tensor weights, {EPSILONS}, str backend) -> Tensor",
    "gaussian_aggregation",
    _stage_fake,
    backward=_stage_backward,
    setup_context=setup_gather_context,
)
legacy.define(
    f"gather_stage_backward(Tensor grad, {PARAMETERS}, Tensor weights, {EPSILONS}, bool need_hidden, bool need_norms, "
    "bool need_projection, bool need_weights, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "gaussian_aggregation",
    _stage_backward_fake,
)
