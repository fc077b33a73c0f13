"""Class aggregation: at every position, a transformer layer with linear attention over all classes.

    y = average-pool(x)
    n = LN₁(y);   q = φ(W_q [n ; g] + b_q),   k = φ(W_k [n ; g] + b_k),   v = W_v n + b_v,   φ = elu + 1
    y ← y + (q · Σ_t k_t ⊗ v_t) / (q · Σ_t k_t + 1e-6)
    y ← y + W₂ · ReLU(W₁ LN₂(y) + b₁) + b₂
    out = x + upsample(y)

Exact rewrites: W [n ; g] = Wₙ n + W_g g, with the share of the text guidance computed once for all positions; and the
classes that pad a short list are all alike, so they enter both sums as a constant times their number instead of as
tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_heads, check_positive, check_tensors
from ._tiles import map_tiles, tile_size

NORMALISER_EPS = 1e-6


def class_aggregation(
    x: Tensor,
    guidance: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    padding_token: Tensor,
    padding_guidance: Tensor,
    *,
    heads: int = 4,
    pooling: int = 1,
    pad_length: int = 256,
) -> Tensor:
    """One linear transformer layer over the classes, guided by text (CAT-Seg, section 3.3, equation 3).

    Args:
        x: (B, T, H, W, C) cost embedding.
        guidance: (T, G) text guidance that all images share, or (B, T, G).
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: (C,).
        q_weight, k_weight: (C, C + G), the first C columns read x and the last G the guidance; v_weight: (C, C);
            biases (C,).
        fc1_weight: (M, C); fc1_bias: (M,); fc2_weight: (C, M); fc2_bias: (C,).
        padding_token: (C,), padding_guidance: (G,): the class that fills a list shorter than `pad_length`. As
            published it takes part as a key and value like any other class, so results for T < `pad_length` depend on
            it.
        heads: attention heads; divides C.
        pooling: side of the average pooling before the layer; its result is resized back bilinearly (corners aligned).
        pad_length: list length up to which classes are padded; 0 pads nothing.

    Returns:
        (B, T, H, W, C): x plus the layer's output, which holds its own residual (as published).

    Raises:
        TypeError, ValueError: a tensor, `heads`, `pooling` or `pad_length` does not fit.
    """
    shared = isinstance(guidance, Tensor) and guidance.dim() == 2
    check_tensors(
        "class_aggregation",
        x=(x, "B T H W C"),
        guidance=(guidance, "T G" if shared else "B T G"),
        norm1_weight=(norm1_weight, "C"),
        norm1_bias=(norm1_bias, "C"),
        q_weight=(q_weight, "C C+G"),
        q_bias=(q_bias, "C"),
        k_weight=(k_weight, "C C+G"),
        k_bias=(k_bias, "C"),
        v_weight=(v_weight, "C C"),
        v_bias=(v_bias, "C"),
        norm2_weight=(norm2_weight, "C"),
        norm2_bias=(norm2_bias, "C"),
        fc1_weight=(fc1_weight, "M C"),
        fc1_bias=(fc1_bias, "M"),
        fc2_weight=(fc2_weight, "C M"),
        fc2_bias=(fc2_bias, "C"),
        padding_token=(padding_token, "C"),
        padding_guidance=(padding_guidance, "G"),
    )
    batch, classes, height, width, channels = x.shape
    check_positive("class_aggregation", T=classes, H=height, W=width)
    check_heads("class_aggregation", heads, channels)
    if q_weight.shape[1] != channels + guidance.shape[-1]:
        raise ValueError(
            f"class_aggregation: q_weight must have C + G = {channels + guidance.shape[-1]} columns, "
            f"got {q_weight.shape[1]}."
        )
    if not 1 <= pooling <= min(height, width):
        raise ValueError(f"class_aggregation: pooling must be in 1..min(H, W) = {min(height, width)}, got {pooling}.")

    if pad_length < 0:
        raise ValueError(f"class_aggregation: pad_length must be at least 0, got {pad_length}.")

    wide = (heads, channels // heads)
    guidance = guidance.unsqueeze(0) if shared else guidance
    # (B or 1, T, 1, C): one row a class for all positions.
    q_guidance = F.linear(guidance, q_weight[:, channels:], q_bias).unsqueeze(2)
    k_guidance = F.linear(guidance, k_weight[:, channels:], k_bias).unsqueeze(2)

    pads = max(pad_length - classes, 0)
    if pads:
        normed = F.layer_norm(padding_token, (channels,), norm1_weight, norm1_bias)
        pad_k = F.elu(F.linear(torch.cat([normed, padding_guidance]), k_weight, k_bias)).add(1).view(wide)
        pad_v = F.linear(normed, v_weight, v_bias).view(wide)
        pad_sum = pads * pad_k
        pad_outer = pad_sum[:, :, None] * pad_v[:, None, :]

    def layer(y: Tensor) -> Tensor:
        """(B, T, s, C) -> the same: the transformer layer at s positions."""
        normed = F.layer_norm(y, (channels,), norm1_weight, norm1_bias)
        q = F.elu(F.linear(normed, q_weight[:, :channels]) + q_guidance).add(1).unflatten(-1, wide)
        k = F.elu(F.linear(normed, k_weight[:, :channels]) + k_guidance).add(1).unflatten(-1, wide)
        v = F.linear(normed, v_weight, v_bias).unflatten(-1, wide)
        # (B, s, heads, T, d): sums over the classes are matrix products at each position and head.
        q, k, v = (part.permute(0, 2, 3, 1, 4) for part in (q, k, v))
        outer = torch.matmul(k.transpose(-1, -2), v)
        total = k.sum(-2)
        if pads:
            outer, total = outer + pad_outer, total + pad_sum
        attended = torch.matmul(q, outer) / (torch.matmul(q, total.unsqueeze(-1)) + NORMALISER_EPS)
        y = y + attended.permute(0, 3, 1, 2, 4).flatten(-2)
        normed = F.layer_norm(y, (channels,), norm2_weight, norm2_bias)
        return y + F.linear(F.relu(F.linear(normed, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)

    pooled = average_pool(x, pooling)
    positions = pooled.flatten(2, 3)
    updated = map_tiles(layer, positions, dim=2, size=tile_size(positions.shape[2], batch * classes, x.device))
    return x + resize_aligned(updated.view(pooled.shape), height, width)


def average_pool(x: Tensor, pooling: int) -> Tensor:
    """(B, T, H, W, C) -> (B, T, H // pooling, W // pooling, C); what is left over at the border is dropped."""
    if pooling == 1:
        return x
    maps = F.avg_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), pooling)
    return maps.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def resize_aligned(x: Tensor, height: int, width: int) -> Tensor:
    """(B, T, h, w, C) -> (B, T, height, width, C), bilinear with aligned corners."""
    batch, classes, *size, _ = x.shape
    if tuple(size) == (height, width):
        return x
    maps = x.flatten(0, 1).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, (height, width), mode="bilinear", align_corners=True)
    return maps.permute(0, 2, 3, 1).unflatten(0, (batch, classes))
