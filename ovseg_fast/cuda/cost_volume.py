"""Launchers of `csrc/cost_volume.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native


def cost_volume(image: Tensor, text: Tensor) -> Tensor:
    """(B, S, E) and (K, E) or (B, K, E) -> (B, K, S)."""
    batch, patches, channels = image.shape
    prompts = text.shape[-2]
    cost = image.new_empty(batch, prompts, patches)
    native.call("ovseg_cost_volume_fwd", image, text, cost, batch, patches, prompts, channels)
    return cost


def cost_volume_backward(
    grad: Tensor, cost: Tensor, image: Tensor, text: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of image and text: the kernel takes the normalisation of both sides, PyTorch the products."""
    image_grad = text_grad = None
    if needs[0]:
        image_grad = _through_norm(grad.transpose(1, 2) @ _through_norm(None, text), image)
    if needs[1]:
        unit = _through_norm(None, image)
        products = grad @ unit if text.dim() == 3 else torch.einsum("bks,bse->ke", grad, unit)
        text_grad = _through_norm(products, text)
    return [image_grad, text_grad]


def _through_norm(products: Tensor | None, x: Tensor) -> Tensor:
    """The gradient of x from that of its rows scaled to length 1; those rows themselves where there is none."""
    out = torch.empty_like(x)
    channels = x.shape[-1]
    products = None if products is None else native.aligned(products)
    native.call("ovseg_cost_volume_norm_bwd", products, x, out, x.numel() // channels, channels)
    return out
