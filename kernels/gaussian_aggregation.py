"""Neighbourhood Gaussian aggregation.

    out = Σ_l w_l · f_l

Backward, from the gradient d of out: df_l = w_l · d and dw_l = Σ d · f_l, summed a block of elements at a time, then
over the blocks.

`gather_stage` composes it with the layer gather: its kernel adds the layers' maps up as it makes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import cdiv, launch
from .layer_gather import gather
from .layer_gather_backward import gather_backward
from .layer_gather_tokens import LAYERS

BLOCK = 2048  # elements of one layer's map that a program works on


@triton.jit
def _forward(features, weights, out, layers, size, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for layer in range(layers):
        f = tl.load(features + i, mask=i < size, other=0.0).to(tl.float32)
        if WEIGHTED:
            f *= tl.load(weights + layer).to(tl.float32)
        total += f
        features += size
    tl.store(out + i, total, mask=i < size)


@triton.jit
def _backward(
    grad, features, weights, features_grad, sums, layers, size, blocks,
    FEATURES: tl.constexpr, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the features' gradient where FEATURES, and its part of the weights' gradient where WEIGHTS."""
    block = tl.program_id(0)
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(grad + i, mask=i < size, other=0.0).to(tl.float32)
    for layer in range(layers):
        if FEATURES:
            tl.store(features_grad + i, d * tl.load(weights + layer).to(tl.float32), mask=i < size)
            features_grad += size
        if WEIGHTS:
            f = tl.load(features + i, mask=i < size, other=0.0).to(tl.float32)
            tl.store(sums + layer * blocks + block, tl.sum(d * f))
            features += size


def gaussian_aggregation(features: Tensor, weights: Tensor) -> Tensor:
    """(L, B, S, E) and (L,) -> (B, S, E)."""
    features, weights = features.contiguous(), weights.contiguous()
    out = features.new_empty(features.shape[1:])
    launch(
        _forward, (cdiv(out.numel(), BLOCK),),
        features, weights, out, len(features), out.numel(), WEIGHTED=True, BLOCK=BLOCK,
    )  # fmt: skip
    return out


def gaussian_aggregation_backward(
    grad: Tensor, features: Tensor, weights: Tensor, need_features: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of features and weights; an empty tensor where none is needed."""
    grad, features, weights = grad.contiguous(), features.contiguous(), weights.contiguous()
    layers, size = len(features), grad.numel()
    blocks = cdiv(size, BLOCK)
    features_grad = torch.empty_like(features) if need_features else features.new_empty(0)
    sums = features.new_empty((layers, blocks) if need_weights else 0, dtype=torch.float32)
    launch(
        _backward, (blocks,),
        grad, features, weights, features_grad, sums, layers, size, blocks,
        FEATURES=need_features, WEIGHTS=need_weights, BLOCK=BLOCK,
    )  # fmt: skip
    return features_grad, sums.sum(1).to(features.dtype) if need_weights else features.new_empty(0)


def gather_stage(
    hidden: Sequence[Tensor], patches: int, shared_weight: Tensor, shared_bias: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, projection: Tensor, weights: Tensor, shared_eps: float, norm_eps: float,
) -> Tensor:  # fmt: skip
    """L tensors (B, N, D), (D,) twice, (L, D) twice, (L, D, E) and (L,) -> (B, S, E)."""
    layers = len(hidden)
    summed = min(layers, LAYERS)
    parts = cdiv(layers, summed)  # one, unless there are more layers than a launch takes
    total = hidden[0].new_empty(len(hidden[0]), patches, projection.shape[-1])
    maps = total[None] if parts == 1 else total.new_empty(parts, *total.shape, dtype=torch.float32)
    gather(
        hidden, patches, shared_weight, shared_bias, norm_weight, norm_bias, projection, weights.contiguous(), maps,
        summed, shared_eps, norm_eps,
    )  # fmt: skip
    if parts > 1:
        launch(
            _forward, (cdiv(total.numel(), BLOCK),),
            maps, weights, total, parts, total.numel(), WEIGHTED=False, BLOCK=BLOCK,
        )  # fmt: skip
    return total


def gather_stage_backward(
    grad: Tensor, hidden: Sequence[Tensor], patches: int, shared_weight: Tensor, shared_bias: Tensor,
    norm_weight: Tensor, norm_bias: Tensor, projection: Tensor, weights: Tensor, shared_eps: float, norm_eps: float,
    need_hidden: bool, need_norms: bool, need_projection: bool, need_weights: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the hidden states (L, B, N, D), the five parameters and the weights; empty where none is needed."""
    return gather_backward(
        grad, hidden, patches, shared_weight, shared_bias, norm_weight, norm_bias, projection, weights.contiguous(),
        shared_eps, norm_eps, need_hidden, need_norms, need_projection, need_weights,
    )  # fmt: skip
