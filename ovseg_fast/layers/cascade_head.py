"""Cascade head: three independent decoders over Gaussian-aggregated stages of the image encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.gaussian_aggregation import gaussian_weights


class UnusedParts(nn.Module):
    """What released checkpoints hold for each decoder layer but the method never reads; kept to write them back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, width in (("in", 3 * channels), ("out", channels)):
            self.register_buffer(f"self_attn_{name}_proj_weight", torch.zeros(width, channels))
            self.register_buffer(f"self_attn_{name}_proj_bias", torch.zeros(width))
        self.register_buffer("norm1_weight", torch.ones(channels))
        self.register_buffer("norm1_bias", torch.zeros(channels))


class DecoderLayer(nn.Module):
    """Post-norm cross-attention layer without self-attention (Cascade-CLIP, section 3.4).

    Args:
        channels: D of queries and memory; heads: attention heads; hidden: feed-forward width; dropout: probability.
    """

    attention = "sdpa"  # or "xformers": what the PyTorch form of mask attention calls

    def __init__(self, channels: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q, self.k, self.v, self.proj = (nn.Linear(channels, channels) for _ in range(4))
        self.norm2 = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, hidden)
        self.linear2 = nn.Linear(hidden, channels)
        self.norm3 = nn.LayerNorm(channels)
        self.unused = UnusedParts(channels)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """(B, T, D) and (B, S, D) -> (B, T, D)."""
        weights = (tensor for part in (self.q, self.k, self.v, self.proj) for tensor in (part.weight, part.bias))
        dropout = self.dropout if self.training else 0.0
        attended = ops.mask_attention(
            queries, memory, *weights, heads=self.heads, dropout=dropout, attention=self.attention
        )
        queries = self.norm2(queries + self._drop(attended))
        updated = self.linear2(self._drop(F.relu(self.linear1(queries))))
        return self.norm3(queries + self._drop(updated))

    def scores(self, queries: Tensor, memory: Tensor) -> Tensor:
        """(B, T, D) and (B, S, D) -> head-averaged scores (B, T, S), before the softmax."""
        q, k = self.q, self.k
        return ops.mask_scores(queries, memory, q.weight, q.bias, k.weight, k.bias, heads=self.heads)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class CascadedDecoder(nn.Module):
    """Decoder of one stage, with this many `DecoderLayer`s; of the last one only the scores are computed."""

    def __init__(self, channels: int, layers: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(channels, heads, hidden, dropout) for _ in range(layers))

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """(B, T, D) and (B, S, D) -> mask logits (B, T, S)."""
        *stack, last = self.layers
        for layer in stack:
            queries = layer(queries, memory)
        return cast(DecoderLayer, last).scores(queries, memory)


class CascadeHead(nn.Module):
    """Neighbourhood Gaussian aggregation and cascaded decoders (Cascade-CLIP, sections 3.3 and 3.4).

    Args:
        channels: E of image and text embeddings; stages: number of layers gathered in each stage, the last one being
            the encoder's last block alone; layers, heads, hidden, dropout: of each decoder.
    """

    def __init__(
        self, channels: int, stages: Sequence[int], layers: int, heads: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.stage_weights = nn.ParameterList(nn.Parameter(gaussian_weights(count)) for count in stages[:-1])
        self.query_projections = nn.ModuleList(nn.Linear(2 * channels, channels) for _ in stages)
        self.decoders = nn.ModuleList(CascadedDecoder(channels, layers, heads, hidden, dropout) for _ in stages)

    def aggregate(self, features: Tensor) -> list[Tensor]:
        """(L, B, S, E) features of all gathered layers -> the stages' maps, each (B, S, E).

        The model gathers each stage in one call instead, `ops.layer_gather` with weights.
        """
        *parts, last = features.split([*map(len, self.stage_weights), 1])
        return [*map(ops.gaussian_aggregation, parts, self.stage_weights), last[0]]

    def forward(self, stages: Sequence[Tensor], global_embedding: Tensor, text: Tensor) -> Tensor:
        """Sum of the stages' mask logits, (B, T, S).

        Args:
            stages: one map (B, S, E) per stage, as `aggregate` returns them.
            global_embedding, text: (B, E) of the image and (T, E), unit length.
        """
        text = text.expand(global_embedding.shape[0], -1, -1)
        relation = torch.cat([global_embedding.unsqueeze(1) * text, text], -1)
        parts = zip(self.decoders, self.query_projections, stages, strict=True)
        return torch.stack([decoder(project(relation), memory) for decoder, project, memory in parts]).sum(0)
