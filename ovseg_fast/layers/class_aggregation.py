"""Class aggregation: a transformer layer over the classes at every position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .prepared import Prepared


class ClassAggregation(nn.Module):
    """Parameters of `ops.class_aggregation` (CAT-Seg, section 3.3).

    Args:
        channels: C of the cost embedding; guidance: G of the text guidance; heads: attention heads.
        pad_length: list length up to which classes are padded with the learned padding class.
        attention: `"linear"`, or `"full"` for a softmax over the classes.
    """

    def __init__(self, channels: int, guidance: int, heads: int, pad_length: int, *, attention: str = "linear") -> None:
        super().__init__()
        self.heads, self.pad_length, self.attention = heads, pad_length, attention
        self.norm1 = nn.LayerNorm(channels)
        self.q, self.k = (nn.Linear(channels + guidance, channels) for _ in range(2))
        self.v = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)
        self.padding_token = nn.Parameter(torch.zeros(channels))
        self.padding_guidance = nn.Parameter(torch.zeros(guidance))
        self.prepared = Prepared()

    def forward(self, x: Tensor, guidance: Tensor, pooling: int) -> Tensor:
        """(B, T, H, W, C) and text guidance (T, G) or (B, T, G) -> (B, T, H, W, C)."""
        parts = (self.norm1, self.q, self.k, self.v, self.norm2, self.fc1, self.fc2)
        tensors = [tensor for part in parts for tensor in (part.weight, part.bias)]
        weights = ops.ClassAggregationWeights(*(*tensors, self.padding_token, self.padding_guidance))
        options: dict[str, Any] = {"heads": self.heads, "pooling": pooling, "pad_length": self.pad_length}
        return ops.class_aggregation(x, guidance, weights, **options, attention=self.attention, prepare=self.prepared)
