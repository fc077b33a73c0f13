"""Upsampling decoder of CAT-Seg (arXiv 2303.11797), shared by all classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layers import conv3x3


def upsampling_stage(weights: dict[str, Tensor], prefix: str, x: Tensor, guidance: Tensor) -> Tensor:
    """2×2 transposed convolution, guidance repeated for every class and concatenated, two 3×3 convolutions.

    x (B·T, C, H, W), guidance (B, G, 2H, 2W); `prefix` is `decoder1.` or `decoder2.` -> (B·T, C', 2H, 2W).
    """
    x = F.conv_transpose2d(x, weights[prefix + "up.weight"], weights[prefix + "up.bias"], stride=2)
    T = x.shape[0] // guidance.shape[0]
    guidance = guidance[:, None].repeat(1, T, 1, 1, 1).flatten(0, 1)
    x = torch.cat([x, guidance], dim=1)
    for conv, norm in (("0", "1"), ("3", "4")):
        x = conv3x3(weights, f"{prefix}conv.double_conv.{conv}", x)
        name = f"{prefix}conv.double_conv.{norm}"
        x = F.relu(F.group_norm(x, x.shape[1] // 16, weights[name + ".weight"], weights[name + ".bias"]))
    return x


def decoder(weights: dict[str, Tensor], x: Tensor, guidance: Sequence[Tensor]) -> Tensor:
    """x (B, C, T, H, W), guidance [g1 (B, G1, 2H, 2W), g2 (B, G2, 4H, 4W)] before projection -> (B, T, 4H, 4W)."""
    B, C, T, H, W = x.shape
    x = x.permute(0, 2, 1, 3, 4).reshape(B * T, C, H, W)
    for i, g in enumerate(guidance):
        g = F.relu(conv3x3(weights, f"decoder_guidance_projection.{i}.0", g))
        x = upsampling_stage(weights, f"decoder{i + 1}.", x, g)
    x = conv3x3(weights, "head", x)
    return x.reshape(B, T, *x.shape[-2:])
