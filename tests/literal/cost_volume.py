"""Cost volume of CAT-Seg (arXiv 2303.11797): cosine similarity of every patch with every class."""

from __future__ import annotations

import torch
from torch import Tensor

from ._layers import unit


def cost_volume(img: Tensor, text: Tensor) -> Tensor:
    """cost[b, p, t, y, x] = cos(img[b, :, y, x], text[b, t, p, :]).

    img (B, C, H, W), text (B, T, P, C) -> (B, P, T, H, W).
    """
    return torch.einsum("bchw,btpc->bpthw", unit(img, dim=1), unit(text, dim=-1))
