"""Cost volume: cosine similarity between every patch and every prompt of every class.

cost[b, t, y, x, p] = <image[b, y, x], text[t, p]> / (‖image[b, y, x]‖ · ‖text[t, p]‖)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .common import registration
from .common.checks import check_positive, check_tensors


def cost_volume(image: Tensor, text: Tensor) -> Tensor:
    """Cosine cost volume between dense image embeddings and text embeddings (CAT-Seg, section 3.2, equation 1).

    Args:
        image: (B, H, W, E) dense image embeddings, any length.
        text: (T, P, E) text embeddings, any length.

    Returns:
        (B, T, H, W, P) cosines in -1..1. A vector of length zero gives 0.

    Raises:
        TypeError, ValueError: dtype, device, rank or widths do not fit, or there is no class, prompt or patch.
    """
    check_cost_inputs("cost_volume", image, text)
    backend = backends.choose("cost_volume", image, text)
    if backend == "torch":
        volume = torch_form(image, text)
    else:
        volume = torch.ops.ovseg_fast.cost_volume(*registration.autocast(image, text), backend)
    return volume.permute(0, 1, 3, 4, 2)


def torch_form(image: Tensor, text: Tensor) -> Tensor:
    """(B, H, W, E) and (T, P, E) -> (B, T, P, H, W), as the kernels."""
    patches, prompts = F.normalize(image, dim=-1).flatten(1, 2), F.normalize(text, dim=-1).flatten(0, 1)
    volume = torch.matmul(prompts, patches.transpose(1, 2))
    return volume.view(image.shape[0], *text.shape[:2], *image.shape[1:3])


def check_cost_inputs(operator: str, image: Tensor, text: Tensor, **weights: tuple[Tensor, str]) -> None:
    """Check `image` and `text` as `cost_volume` takes them, and `weights` with them."""
    check_tensors(operator, image=(image, "B H W E"), text=(text, "T P E"), **weights)
    _, height, width, channels = image.shape
    check_positive(operator, H=height, W=width, E=channels, T=text.shape[0], P=text.shape[1])


registration.define(
    "cost_volume(Tensor image, Tensor text) -> Tensor",
    "cost_volume",
    lambda image, text: image.new_empty(image.shape[0], *text.shape[:2], *image.shape[1:3]),
    saved=(0,),
)
