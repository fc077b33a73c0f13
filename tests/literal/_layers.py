"""The layers that every literal form is made of, with their parameters taken from a dict by name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Linear layer `name`: x (..., in) -> (..., out)."""
    return F.linear(x, weights[name + ".weight"], weights[name + ".bias"])


def layer_norm(weights: dict[str, Tensor], name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm `name` over the last axis of x."""
    return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"], eps)


def conv3x3(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """3×3 convolution `name` with padding 1, with a bias if it has one: x (N, in, H, W) -> (N, out, H, W)."""
    return F.conv2d(x, weights[name + ".weight"], weights.get(name + ".bias"), padding=1)


def resize(x: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Bilinear resize of x (N, C, H, W) to `size` (height, width)."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


def count(weights: dict[str, Tensor], prefix: str) -> int:
    """How many numbered modules `<prefix>0.`, `<prefix>1.`, ... the weights hold."""
    n = 0
    while any(name.startswith(f"{prefix}{n}.") for name in weights):
        n += 1
    return n


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(N, L, heads·d) -> (N, heads, L, d)."""
    n, length, channels = x.shape
    return x.reshape(n, length, heads, channels // heads).permute(0, 2, 1, 3)


def merge_heads(x: Tensor) -> Tensor:
    """(N, heads, L, d) -> (N, L, heads·d)."""
    n, heads, length, d = x.shape
    return x.permute(0, 2, 1, 3).reshape(n, length, heads * d)


def unit(x: Tensor, dim: int) -> Tensor:
    """x divided by its L2 norm along `dim`."""
    return F.normalize(x, dim=dim)
