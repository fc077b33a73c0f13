"""Cost embedding of CAT-Seg (arXiv 2303.11797): a 7×7 convolution over each class's cost map."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cost_embedding(corr: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """corr (B, P, T, H, W), weight (C, P, 7, 7), bias (C,) -> (B, C, T, H, W); the prompts are input channels."""
    B, P, T, H, W = corr.shape
    maps = corr.permute(0, 2, 1, 3, 4).reshape(B * T, P, H, W)
    maps = F.conv2d(maps, weight, bias, padding=weight.shape[-1] // 2)
    return maps.reshape(B, T, -1, H, W).permute(0, 2, 1, 3, 4)
