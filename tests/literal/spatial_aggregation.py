"""Spatial aggregation of CAT-Seg (arXiv 2303.11797): guided Swin blocks over each class's cost map.

Parameter names are those of the published checkpoints, below `layers.<i>.swin_block.`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layers import layer_norm, linear, merge_heads, split_heads


def effective_window(resolution: tuple[int, int], window: int, shift: int) -> tuple[int, int]:
    """(window, shift) on a map of `resolution`: one no larger than the window is one window with no shift."""
    if min(resolution) <= window:
        return min(resolution), 0
    return window, shift


def window_partition(x: Tensor, window: int) -> Tensor:
    """(N, H, W, C) -> (N·windows, window·window, C), windows row by row."""
    N, H, W, C = x.shape
    if H % window or W % window:
        raise ValueError(f"x has a {H}×{W} map, expected sides that are multiples of the window {window}")
    x = x.reshape(N, H // window, window, W // window, window, C)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, C)


def window_reverse(windows: Tensor, window: int, resolution: tuple[int, int]) -> Tensor:
    """(N·windows, window·window, C) -> (N, H, W, C), the inverse of `window_partition`."""
    H, W = resolution
    x = windows.reshape(-1, H // window, W // window, window, window, windows.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, H, W, windows.shape[-1])


# cached because the published module keeps it as a buffer
@lru_cache(maxsize=32)
def shift_mask(
    resolution: tuple[int, int],
    window: int,
    shift: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """Mask that is added to the scores of a shifted map: 0 inside a region, −100 across region borders.

    -> (windows, window·window, window·window).
    """
    regions = torch.zeros(1, *resolution, 1)
    bands = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate((r, c) for r in bands for c in bands):
        regions[:, rows, columns] = number
    regions = window_partition(regions, window).squeeze(-1)
    different = regions[:, :, None] != regions[:, None, :]
    return torch.zeros(different.shape).masked_fill(different, -100.0).to(device, dtype)


def window_attention(
    weights: dict[str, Tensor], prefix: str, guided: Tensor, heads: int, mask: Tensor | None = None
) -> Tensor:
    """Self-attention inside windows; queries and keys read [x, guidance], values read x.

    guided (N·windows, n, C + G) is [x, guidance], mask (windows, n, n) or None -> (N·windows, n, C).
    """
    x = guided[..., : weights[prefix + "v.weight"].shape[1]]
    q = split_heads(linear(weights, prefix + "q", guided), heads)
    k = split_heads(linear(weights, prefix + "k", guided), heads)
    v = split_heads(linear(weights, prefix + "v", x), heads)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        count, n, _ = mask.shape
        scores = scores.reshape(-1, count, heads, n, n) + mask[None, :, None]
        scores = scores.reshape(-1, heads, n, n)
    out = merge_heads(scores.softmax(dim=-1) @ v)
    return linear(weights, prefix + "proj", out)


def swin_block(
    weights: dict[str, Tensor],
    prefix: str,
    x: Tensor,
    guidance: Tensor,
    resolution: tuple[int, int],
    window: int = 12,
    shift: int = 0,
    heads: int = 4,
) -> Tensor:
    """One guided Swin block: x + attention(norm1(x), guidance), then + MLP(norm2(·)) with exact GELU.

    x (N, H·W, C) and guidance (N, H·W, G) with N = B·T; `prefix` ends in `block_1.` or `block_2.` -> (N, H·W, C).
    """
    H, W = resolution
    N, S, C = x.shape
    if S != H * W:
        raise ValueError(f"x has {S} tokens, expected {H * W} for resolution {H}×{W}")
    window, shift = effective_window((H, W), window, shift)
    mask = shift_mask((H, W), window, shift, x.dtype, x.device) if shift else None

    tokens = layer_norm(weights, prefix + "norm1", x)
    guided = torch.cat([tokens, guidance], dim=-1).reshape(N, H, W, -1)
    if shift:
        guided = guided.roll((-shift, -shift), dims=(1, 2))
    out = window_attention(weights, prefix + "attn.", window_partition(guided, window), heads, mask)
    out = window_reverse(out, window, (H, W))
    if shift:
        out = out.roll((shift, shift), dims=(1, 2))
    x = x + out.reshape(N, S, C)

    hidden = F.gelu(linear(weights, prefix + "mlp.fc1", layer_norm(weights, prefix + "norm2", x)))
    return x + linear(weights, prefix + "mlp.fc2", hidden)


def swin_pair(
    weights: dict[str, Tensor], prefix: str, x: Tensor, guidance: Tensor, window: int = 12, heads: int = 4
) -> Tensor:
    """Two Swin blocks, shift 0 and window/2, with the guidance repeated for every class and normalised once.

    x (B, C, T, H, W), guidance (B, G, H, W); `prefix` ends in `swin_block.` -> (B, C, T, H, W).
    """
    B, C, T, H, W = x.shape
    tokens = x.permute(0, 2, 3, 4, 1).reshape(B * T, H * W, C)
    guidance = guidance.flatten(2).transpose(1, 2)
    guidance = guidance[:, None].repeat(1, T, 1, 1).reshape(B * T, H * W, -1)
    guidance = layer_norm(weights, prefix + "guidance_norm", guidance)
    tokens = swin_block(weights, prefix + "block_1.", tokens, guidance, (H, W), window, 0, heads)
    tokens = swin_block(weights, prefix + "block_2.", tokens, guidance, (H, W), window, window // 2, heads)
    return tokens.reshape(B, T, H, W, C).permute(0, 4, 1, 2, 3)
