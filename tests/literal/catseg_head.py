"""The whole cost aggregation of CAT-Seg (arXiv 2303.11797), from CLIP features to logits.

Parameter names are those of the published checkpoints without `sem_seg_head.predictor.transformer.`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._layers import conv3x3, count, linear, unit
from .class_aggregation import class_aggregation
from .cost_embedding import cost_embedding
from .cost_volume import cost_volume
from .spatial_aggregation import swin_pair
from .upsampling_decoder import decoder

DROPPED = -100.0


def aggregator_layer(
    weights: dict[str, Tensor],
    prefix: str,
    x: Tensor,
    guidance: Tensor,
    text_guidance: Tensor,
    pooling: int | tuple[int, int] = 2,
    pad_len: int = 256,
    window: int = 12,
    heads: int = 4,
) -> Tensor:
    """Spatial, then class aggregation.

    x (B, C, T, H, W), guidance (B, G, H, W) and text_guidance (B, T, G) already projected; `prefix` is `layers.<i>.`.
    """
    x = swin_pair(weights, prefix + "swin_block.", x, guidance, window, heads)
    return class_aggregation(weights, prefix + "attention.", x, text_guidance, pooling, pad_len, heads)


def class_scores(img: Tensor, text: Tensor) -> Tensor:
    """Largest cosine of each class over prompts and positions: img (B, E, H, W), text (B, T, P, E) -> (B, T)."""
    return cost_volume(img, text).amax(dim=(1, 3, 4))


def select_classes(img: Tensor, text: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` best classes of each image in ascending order: (B, keep)."""
    return class_scores(img, text).topk(keep, dim=1).indices.sort(dim=1).values


def catseg_head(
    weights: dict[str, Tensor],
    img: Tensor,
    text: Tensor,
    g1: Tensor,
    g2: Tensor,
    pooling: int | tuple[int, int] = 2,
    pad_len: int = 256,
    g0: Tensor | None = None,
    window: int = 12,
    heads: int = 4,
) -> Tensor:
    """Logits of every class at four times the resolution of the image features.

    img (B, E, H, W) dense image embedding, text (B, T, P, E), g1 (B, G1, 2H, 2W) and g2 (B, G2, 4H, 4W) decoder
    guidance, g0 (B, E, H, W) appearance guidance, by default img -> (B, T, 4H, 4W). With more than `pad_len` classes
    the best `pad_len` of each image are computed, from unit-length text; the others get −100.
    """
    B, T, P, E = text.shape
    chosen = None
    if pad_len < T:
        chosen = select_classes(img, text, pad_len)
        text = unit(text, dim=-1).gather(1, chosen[:, :, None, None].expand(-1, -1, P, E))

    corr = cost_volume(img, text)
    x = cost_embedding(corr, weights["conv1.weight"], weights["conv1.bias"])
    guidance = F.relu(conv3x3(weights, "guidance_projection.0", img if g0 is None else g0))
    text_guidance = F.relu(linear(weights, "text_guidance_projection.0", unit(text.mean(dim=2), dim=-1)))
    for i in range(count(weights, "layers.")):
        x = aggregator_layer(weights, f"layers.{i}.", x, guidance, text_guidance, pooling, pad_len, window, heads)
    logits = decoder(weights, x, [g1, g2])
    if chosen is None:
        return logits
    out = logits.new_full((B, T, *logits.shape[-2:]), DROPPED)
    return out.scatter(1, chosen[:, :, None, None].expand_as(logits), logits)
