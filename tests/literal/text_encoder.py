"""CLIP's text encoder (arXiv 2103.00020) over the whole context of 77 tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ._layers import count, layer_norm
from .encoder_block import clip_block


def text_encoder(weights: dict[str, Tensor], ids: Tensor, prefix: str = "") -> Tensor:
    """Embedding at the end token, the one with the largest id, before any normalisation.

    ids (N, 77) int64 -> (N, E). Blocks may hold a joint `in_proj_weight` or split q, k and v.
    """
    x = weights[prefix + "token_embedding.weight"][ids] + weights[prefix + "positional_embedding"]
    length = ids.shape[1]
    mask = torch.full((length, length), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
    for i in range(count(weights, prefix + "transformer.resblocks.")):
        x = clip_block(weights, f"{prefix}transformer.resblocks.{i}.", x, mask)
    x = layer_norm(weights, prefix + "ln_final", x)
    end = x[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]
    return end @ weights[prefix + "text_projection"]
