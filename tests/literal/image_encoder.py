"""CLIP's image encoder in the two published variants.

`dense_image_encoder` is CAT-Seg's (arXiv 2303.11797), `prompted_image_encoder` Cascade-CLIP's
(arXiv 2406.00670).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layers import count, layer_norm, linear
from .encoder_block import clip_block, clip_value_block


def resize_positions(positions: Tensor, grid: tuple[int, int], mode: str) -> Tensor:
    """Position embedding (1 + s·s, D) -> (1 + H·W, D): the grid interpolated, the class position kept."""
    if len(positions) == 1 + grid[0] * grid[1]:
        return positions
    side = round((len(positions) - 1) ** 0.5)
    maps = positions[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=grid, mode=mode, align_corners=False)
    return torch.cat([positions[:1], maps.flatten(2).transpose(1, 2)[0]])


def patch_embedding(weights: dict[str, Tensor], prefix: str, pixels: Tensor) -> Tensor:
    """pixels (B, 3, h, w), normalised -> (B, D, H, W)."""
    weight = weights[prefix + "conv1.weight"]
    return F.conv2d(pixels, weight, stride=weight.shape[-1])


def dense_image_encoder(
    weights: dict[str, Tensor], pixels: Tensor, guidance_blocks: Sequence[int] = (3, 7), prefix: str = ""
) -> tuple[Tensor, list[Tensor]]:
    """Dense tokens (B, 1 + H·W, E), class token first, not normalised, and the outputs of the guidance blocks.

    pixels (B, 3, h, w), normalised; `prefix` ends in `visual.`; guidance maps are (B, D, H, W).
    """
    x = patch_embedding(weights, prefix, pixels)
    B, D, H, W = x.shape
    x = torch.cat([weights[prefix + "class_embedding"].expand(B, 1, D), x.flatten(2).transpose(1, 2)], dim=1)
    x = x + resize_positions(weights[prefix + "positional_embedding"], (H, W), "bicubic")
    x = layer_norm(weights, prefix + "ln_pre", x)
    blocks = count(weights, prefix + "transformer.resblocks.")
    guidance = []
    for i in range(blocks):
        block = clip_block if i < blocks - 1 else clip_value_block
        x = block(weights, f"{prefix}transformer.resblocks.{i}.", x)
        if i in guidance_blocks:
            guidance.append(x[:, 1:].transpose(1, 2).reshape(B, D, H, W))
    return layer_norm(weights, prefix + "ln_post", x) @ weights[prefix + "proj"], guidance


def prompted_image_encoder(
    weights: dict[str, Tensor], pixels: Tensor, outputs: Sequence[int] = (5, 6, 7, 8, 9, 10, 11), prefix: str = ""
) -> tuple[list[Tensor], tuple[int, int]]:
    """Hidden states (B, 1 + prompts + H·W, D) after the blocks `outputs`, and the grid (H, W).

    The class embedding enters twice and the prompts of every block but the first replace those of the one before.
    """
    x = patch_embedding(weights, prefix, pixels)
    B, D, H, W = x.shape
    token = weights[prefix + "class_embedding"].expand(B, 1, D)
    x = torch.cat([token, x.flatten(2).transpose(1, 2)], dim=1)
    positions = resize_positions(weights[prefix + "positional_embedding"], (H, W), "bilinear")
    x = x + torch.cat([positions[:1] + weights[prefix + "class_embedding"], positions[1:]])
    x = layer_norm(weights, prefix + "ln_pre", x)

    def prompts(embeddings: Tensor) -> Tensor:
        return linear(weights, prefix + "prompt_proj", embeddings).expand(B, -1, -1)

    shallow = prompts(weights[prefix + "prompt_embeddings"])
    deep = weights[prefix + "deep_prompt_embeddings"]
    n = shallow.shape[1]
    x = torch.cat([x[:, :1], shallow, x[:, 1:]], dim=1)
    hidden = []
    for i in range(count(weights, prefix + "transformer.resblocks.")):
        if i > 0:
            x = torch.cat([x[:, :1], prompts(deep[i - 1]), x[:, 1 + n :]], dim=1)
        x = clip_block(weights, f"{prefix}transformer.resblocks.{i}.", x)
        if i in outputs:
            hidden.append(x)
    return hidden, (H, W)
