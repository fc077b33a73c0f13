"""Launchers of `csrc/cost_embedding.cu`, `cost_embedding_backward.cu` and `cost_embedding_weight_backward.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from .cost_volume import cost_volume as cost_volume
from .cost_volume import cost_volume_backward as cost_volume_backward

SHARES = 264  # blocks, about, that share the sum of the weight's gradient: two for each processor of an H100
SHARE = 192  # tokens, about, that are worth a block


def cost_embedding(image: Tensor, text: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, H, W, E), (T, P, E), (C, P, K, K), (C,) -> (B, T, H, W, C)."""
    batch, height, width, channels = image.shape
    classes, prompts, _ = text.shape
    outputs, size = weight.shape[0], weight.shape[-1]
    out = image.new_empty(batch, classes, height, width, outputs)
    native.call(
        "ovseg_cost_embedding_fwd", image, text, weight, bias, out,
        batch, height, width, channels, classes, prompts, outputs, size,
    )  # fmt: skip
    return out


def cost_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """(B, T, H, W, C), (C, P, K, K) -> (B, T, P, H, W)."""
    batch, classes, height, width, outputs = grad.shape
    prompts, size = weight.shape[1], weight.shape[-1]
    out = grad.new_empty(batch, classes, prompts, height, width)
    taps = native.aligned(weight.permute(1, 2, 3, 0))
    native.call(
        "ovseg_cost_embedding_cost_bwd", grad, taps, out, batch * classes, prompts, height, width, outputs, size
    )
    return out


def weight_gradient(grad: Tensor, cost: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, H, W, C), (B, T, P, H, W) -> gradients of the weight, (C, P, K, K), and the bias, (C,)."""
    batch, classes, height, width, outputs = grad.shape
    prompts, size = weight.shape[1], weight.shape[-1]
    parts = max(min(batch * classes * height * width // SHARE, SHARES // prompts), 1)
    partial = grad.new_empty(parts, outputs, prompts, size * size + 1, dtype=torch.float32)
    weight_grad, bias_grad = grad.new_empty(weight.shape), grad.new_empty(outputs)
    native.call(
        "ovseg_cost_embedding_weight_bwd", grad, cost, partial, weight_grad, bias_grad,
        batch * classes, prompts, height, width, outputs, size, parts,
    )  # fmt: skip
    return weight_grad, bias_grad
