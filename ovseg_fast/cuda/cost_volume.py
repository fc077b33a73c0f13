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
    native.call(
        "ovseg_cost_volume_fwd", native.aligned(image), native.aligned(text), cost,
        batch, patches, prompts, channels, int(text.dim() == 3),
    )  # fmt: skip
    return cost


def cost_volume_backward(
    grad: Tensor, cost: Tensor, image: Tensor, text: Tensor, need_image: bool, need_text: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of image and text; an empty tensor where none is needed.

    The kernel takes the normalisation of both sides; the products are PyTorch's.
    """
    image, text = native.aligned(image), native.aligned(text)
    image_grad, text_grad = image.new_empty(0), text.new_empty(0)
    if need_image:
        image_grad = _through_norm(grad.transpose(1, 2) @ _through_norm(None, text), image)
    if need_text:
        unit = _through_norm(None, image)
        products = grad @ unit if text.dim() == 3 else torch.einsum("bks,bse->ke", grad, unit)
        text_grad = _through_norm(products, text)
    return image_grad, text_grad


def _through_norm(products: Tensor | None, x: Tensor) -> Tensor:
    """Gradient of x from that of its rows brought to length 1; those rows themselves where there is none."""
    out = torch.empty_like(x)
    channels = x.shape[-1]
    products = None if products is None else native.aligned(products)
    native.call("ovseg_cost_volume_norm_bwd", products, x, out, x.numel() // channels, channels)
    return out
