"""Launchers of `csrc/cost_embedding.cu`, `cost_embedding_backward.cu` and `cost_embedding_weight_backward.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from .cost_volume import cost_volume, cost_volume_backward

SHARES = 264  # blocks, about, that share the sum of the weight's gradient: two to each processor of an H100
SHARE = 192  # tokens, about, that are worth a block


def cost_embedding(image: Tensor, text: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, H, W, E), (T, P, E) or (B, T, P, E), (C, P, K, K), (C,) -> (B, T, H, W, C)."""
    batch, height, width, channels = image.shape
    classes, prompts = text.shape[-3:-1]
    outputs, size = weight.shape[0], weight.shape[-1]
    out = image.new_empty(batch, classes, height, width, outputs)
    native.call(
        "ovseg_cost_embedding_fwd", *(native.aligned(tensor) for tensor in (image, text, weight, bias)), out,
        batch, height, width, channels, classes, prompts, outputs, size,
    )  # fmt: skip
    return out


def cost_embedding_backward(
    grad: Tensor, image: Tensor, text: Tensor, weight: Tensor, need_image: bool, need_text: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of image, text, weight and bias, the last two together; an empty tensor where none is needed.

    The cost volume is computed again and stored here, as is its gradient: each is 1 / C of `grad`.
    """
    grad = native.aligned(grad)
    patches, embeddings = image.flatten(1, 2), text.flatten(-3, -2)
    cost = cost_volume(patches, embeddings)
    image_grad = text_grad = weight_grad = bias_grad = grad.new_empty(0)
    if need_image or need_text:
        image_grad, text_grad = cost_volume_backward(
            cost_gradient(grad, weight), cost, patches, embeddings, need_image, need_text
        )
    if need_weight:
        weight_grad, bias_grad = weight_gradient(grad, cost, weight)
    return (
        image_grad.view(image.shape if need_image else 0),
        text_grad.view(text.shape if need_text else 0),
        weight_grad,
        bias_grad,
    )


def cost_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """(B, T, H, W, C), (C, P, K, K) -> (B, T · P, H · W)."""
    batch, classes, height, width, outputs = grad.shape
    prompts, size = weight.shape[1], weight.shape[-1]
    out = grad.new_empty(batch, classes * prompts, height * width)
    taps = native.aligned(weight.permute(1, 2, 3, 0))
    native.call(
        "ovseg_cost_embedding_cost_bwd", grad, taps, out, batch * classes, prompts, height, width, outputs, size
    )
    return out


def weight_gradient(grad: Tensor, cost: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, H, W, C), (B, T · P, H · W) -> gradients of the weight, (C, P, K, K), and the bias, (C,)."""
    batch, classes, height, width, outputs = grad.shape
    prompts, size = weight.shape[1], weight.shape[-1]
    parts = max(min(batch * classes * height * width // SHARE, SHARES // prompts), 1)
    partial = grad.new_empty(parts, outputs, prompts, size * size + 1, dtype=torch.float32)
    weight_grad, bias_grad = grad.new_empty(weight.shape), grad.new_empty(outputs)
    native.call(
        "ovseg_cost_embedding_weight_bwd", grad, native.aligned(cost), partial, weight_grad, bias_grad,
        batch * classes, prompts, height, width, outputs, size, parts,
    )  # fmt: skip
    return weight_grad, bias_grad
