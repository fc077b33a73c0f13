"""Launchers of `csrc/cost_volume.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native


def cost_volume(image: Tensor, text: Tensor) -> Tensor:
    """(B, H, W, E) and (T, P, E) -> (B, T, P, H, W)."""
    batch, height, width, channels = image.shape
    classes, prompts, _ = text.shape
    cost = image.new_empty(batch, classes, prompts, height, width)
    native.call("ovseg_cost_volume_fwd", image, text, cost, batch, height * width, classes * prompts, channels)
    return cost


def cost_volume_backward(
    grad: Tensor, cost: Tensor, image: Tensor, text: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of image and text: the kernel takes the normalisation of both sides, PyTorch the products."""
    grad = grad.flatten(3).flatten(1, 2)  # (B, T · P, H · W)
    image_grad = text_grad = None
    if needs[0]:
        units = _through_norm(None, text).flatten(0, 1)
        image_grad = _through_norm(native.aligned(grad.transpose(1, 2) @ units), image)
    if needs[1]:
        units = _through_norm(None, image).flatten(1, 2)
        text_grad = _through_norm(native.aligned(torch.einsum("bks,bse->ke", grad, units)), text)
    return [image_grad, text_grad]


def _through_norm(products: Tensor | None, x: Tensor) -> Tensor:
    """The gradient of x from that of its rows scaled to length 1; the scaled rows themselves if it is None."""
    out = torch.empty_like(x)
    channels = x.shape[-1]
    native.call("ovseg_cost_volume_norm_bwd", products, x, out, x.numel() // channels, channels)
    return out
