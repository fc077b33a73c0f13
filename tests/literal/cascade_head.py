"""The whole decode head of Cascade-CLIP (arXiv 2406.00670), from unit-length maps to mask logits.

Parameter names are those of the published checkpoints without `decode_head.`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layers import count, layer_norm, linear, resize
from .gaussian_aggregation import gaussian_aggregation
from .mask_attention import mask_attention


def decoder_layer(
    weights: dict[str, Tensor], prefix: str, query: Tensor, memory: Tensor, heads: int = 8
) -> tuple[Tensor, Tensor]:
    """Mask attention and a ReLU MLP, post-norm; query (B, T, E), memory (B, S, E) -> (B, T, E), scores (B, T, S).

    The checkpoint's `self_attn` and `norm1` are not used by the published forward pass.
    """
    out, scores = mask_attention(weights, prefix + "multihead_attn.", query, memory, heads)
    query = layer_norm(weights, prefix + "norm2", query + out)
    hidden = F.relu(linear(weights, prefix + "linear1", query))
    query = layer_norm(weights, prefix + "norm3", query + linear(weights, prefix + "linear2", hidden))
    return query, scores


def cascade_decoder(
    weights: dict[str, Tensor], prefix: str, query: Tensor, memory: Tensor, heads: int = 8
) -> tuple[Tensor, list[Tensor]]:
    """All layers of one decoder, each computed in full; `prefix` ends in `cascade_decoders.<k>.`.

    -> the final queries (B, T, E) and the scores (B, T, S) of every layer.
    """
    scores = []
    for i in range(count(weights, prefix + "layers.")):
        query, layer_scores = decoder_layer(weights, f"{prefix}layers.{i}.", query, memory, heads)
        scores.append(layer_scores)
    return query, scores


def cascade_stages(weights: dict[str, Tensor], features: Sequence[Tensor]) -> list[Tensor]:
    """The three stage maps (B, E, H, W) of seven layer maps: two aggregated triples and the last map alone."""
    first = gaussian_aggregation(features[0:3], weights["weights_s1"])
    second = gaussian_aggregation(features[3:6], weights["weights_s2"])
    return [first, second, features[6]]


def stage_scores(
    weights: dict[str, Tensor], features: Sequence[Tensor], global_embedding: Tensor, text: Tensor, heads: int = 8
) -> list[list[Tensor]]:
    """Head-averaged scores (B, T, S) of every layer of every decoder; arguments as for `cascade_head`."""
    B, T = len(global_embedding), len(text)
    text = text[None].repeat(B, 1, 1)
    relation = torch.cat([global_embedding[:, None].repeat(1, T, 1) * text, text], dim=-1)
    result = []
    for k, stage in enumerate(cascade_stages(weights, features)):
        query = linear(weights, f"q_projs.{k}", relation)
        memory = stage.flatten(2).transpose(1, 2)
        result.append(cascade_decoder(weights, f"cascade_decoders.{k}.", query, memory, heads)[1])
    return result


def cascade_masks(
    weights: dict[str, Tensor], features: Sequence[Tensor], global_embedding: Tensor, text: Tensor, heads: int = 8
) -> Tensor:
    """Sum of the last layers' scores of the three decoders, as maps (B, T, H, W) at patch resolution."""
    last = [layers[-1] for layers in stage_scores(weights, features, global_embedding, text, heads)]
    return (last[0] + last[1] + last[2]).reshape(len(global_embedding), len(text), *features[0].shape[-2:])


def cascade_head(
    weights: dict[str, Tensor],
    features: Sequence[Tensor],
    global_embedding: Tensor,
    text: Tensor,
    size: tuple[int, int] = (512, 512),
    heads: int = 8,
) -> Tensor:
    """Mask logits: features, seven maps (B, E, H, W) of unit length, global_embedding (B, E), text (T, E).

    -> (B, T, *size), the summed masks resized bilinearly.
    """
    return resize(cascade_masks(weights, features, global_embedding, text, heads), size)
