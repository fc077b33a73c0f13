"""Neighbourhood Gaussian aggregation: out = Σ_l w_l · f_l

Backward, from the gradient d of out: df_l = w_l · d and dw_l = Σ d · f_l, summed per block first, then over the blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import cdiv, launch

BLOCK = 2048  # elements of one layer's map per program


@triton.jit
def _forward(features, weights, out, layers, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for layer in range(layers):
        f = tl.load(features + i, mask=i < size, other=0.0).to(tl.float32)
        acc += f * tl.load(weights + layer).to(tl.float32)
        features += size
    tl.store(out + i, acc, mask=i < size)


@triton.jit
def _backward(
    grad, features, weights, features_grad, sums, layers, size, blocks,
    FEATURES: tl.constexpr, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the features' gradient if FEATURES, and its part of the weights' gradient if WEIGHTS."""
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
    out = features.new_empty(features.shape[1:])
    launch(_forward, (cdiv(out.numel(), BLOCK),), features, weights, out, len(features), out.numel(), BLOCK=BLOCK)
    return out


def gaussian_aggregation_backward(
    grad: Tensor, features: Tensor, weights: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of features and weights."""
    layers, size = len(features), grad.numel()
    blocks = cdiv(size, BLOCK)
    features_grad = torch.empty_like(features) if needs[0] else None
    sums = features.new_empty(layers, blocks, dtype=torch.float32) if needs[1] else None
    launch(
        _backward, (blocks,),
        grad, features, weights, features_grad, sums, layers, size, blocks,
        FEATURES=needs[0], WEIGHTS=needs[1], BLOCK=BLOCK,
    )  # fmt: skip
    return [features_grad, None if sums is None else sums.sum(1).to(weights.dtype)]
