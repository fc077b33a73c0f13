"""Launchers of `csrc/layer_gather.cu` and `csrc/layer_gather_backward.cu`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native

ROWS_PER_SUM = 32  # rows that one partial sum of the norms' gradients adds up


def layer_gather(
    hidden: Sequence[Tensor], patches: int, shared_weight: Tensor, shared_bias: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, projection: Tensor, weights: Tensor | None, shared_eps: float, norm_eps: float,
) -> Tensor:  # fmt: skip
    """L tensors (B, N, D), (D,) twice, (L, D) twice and (L, D, E) -> (L, B, S, E), or with weights (L,) (B, S, E)."""
    batch, tokens, channels = hidden[0].shape
    layers, width = len(hidden), projection.shape[-1]
    out = hidden[0].new_empty(*([layers] if weights is None else []), batch, patches, width)
    native.call(
        "ovseg_layer_gather_fwd", hidden, shared_weight, shared_bias, norm_weight, norm_bias, projection, weights, out,
        layers, batch, tokens, patches, channels, width, *hidden[0].stride()[:2], shared_eps, norm_eps,
    )  # fmt: skip
    return out


def projection_backward(
    grad: Tensor, hidden: Sequence[Tensor], patches: int, norms: Sequence[Tensor], shared_eps: float, norm_eps: float,
    projection: Tensor, weights: Tensor | None, need_normed: bool, need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The gradient of the product with the projection, what it multiplies, its rows' statistics, weights' gradient."""
    like, layers = hidden[0], len(hidden)
    batch, tokens, channels = like.shape
    rows = batch * patches
    normed = like.new_empty(layers, rows, channels)
    statistics = like.new_empty(layers, rows, 4, dtype=torch.float32)
    native.call(
        "ovseg_layer_gather_normed_bwd", hidden, *norms, normed, statistics,
        layers, batch, tokens, patches, channels, *like.stride()[:2], shared_eps, norm_eps,
    )  # fmt: skip
    projected = torch.bmm(normed, projection)  # replaced by its gradient
    weights_grad = like.new_empty(layers) if need_weights else None
    products = like.new_empty(layers, rows, dtype=torch.float32) if need_weights else None
    native.call(
        "ovseg_layer_gather_length_bwd", grad, projected, weights, weights_grad, products,
        layers, rows, projection.shape[-1],
    )  # fmt: skip
    return projected, normed, statistics, weights_grad


def norms_backward(
    grad: Tensor, hidden: Sequence[Tensor], patches: int, norms: Sequence[Tensor], shared_eps: float, norm_eps: float,
    statistics: Tensor, need_hidden: bool, need_norms: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of the hidden states (L, B, N, D) and partial sums (L, count, 4, D) of the norms' gradients."""
    like, layers = hidden[0], len(hidden)
    batch, tokens, channels = like.shape
    rows = batch * patches
    count = -(-rows // ROWS_PER_SUM)
    hidden_grad = like.new_empty(layers, *like.shape) if need_hidden else None
    means = like.new_empty(layers, rows, 2, dtype=torch.float32) if need_norms else None
    sums = like.new_empty(layers, count, 4, channels, dtype=torch.float32) if need_norms else None
    native.call(
        "ovseg_layer_gather_norms_bwd", grad, hidden, *norms[:3], statistics, hidden_grad, means, sums,
        layers, batch, tokens, patches, channels, count, *like.stride()[:2],
    )  # fmt: skip
    return hidden_grad, sums
