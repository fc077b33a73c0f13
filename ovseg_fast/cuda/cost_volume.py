"""Launchers of `csrc/cost_volume.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native

EPS = 1e-12  # torch.nn.functional.normalize


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

    The products are PyTorch's, and so is the derivative of the normalisation.
    """
    (image_unit, image_norm), (text_unit, text_norm) = _normalised(image), _normalised(text)
    image_grad, text_grad = image.new_empty(0), text.new_empty(0)
    if need_image:
        image_grad = _through_norm(grad.transpose(1, 2) @ text_unit, image_unit, image_norm)
    if need_text:
        along = grad @ image_unit if text.dim() == 3 else torch.einsum("bks,bse->ke", grad, image_unit)
        text_grad = _through_norm(along, text_unit, text_norm)
    return image_grad, text_grad


def _normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1, and the lengths, (..., 1), in float32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).clamp_min(EPS)
    return (x / norm).to(x.dtype), norm


def _through_norm(grad: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """Gradient of what was normalised from the gradient of the result."""
    wide, unit = grad.float(), unit.float()
    return ((wide - unit * (wide * unit).sum(-1, keepdim=True)) / norm).to(grad.dtype)
