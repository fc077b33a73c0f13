"""Spatial aggregation: two guided Swin blocks over each class's map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.common.tiles import tile_size
from . import recompute
from .prepared import Prepared


class SpatialBlock(nn.Module):
    """Parameters of one `ops.spatial_aggregation` block.

    Args:
        channels: C of the cost embedding; guidance: G of the appearance guidance; heads: attention heads.
        window: side of a window; shift: its displacement. As published, a map whose smaller side is no larger than the
            window has windows of that side without shift.
    """

    def __init__(self, channels: int, guidance: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norm1 = nn.LayerNorm(channels)
        self.q, self.k = (nn.Linear(channels + guidance, channels) for _ in range(2))
        self.v, self.proj = (nn.Linear(channels, channels) for _ in range(2))
        self.norm2 = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)
        self.prepared = Prepared()

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """(B, T, H, W, C) and normalised guidance (B, H, W, G) -> (B, T, H, W, C)."""
        window, shift = self.window, self.shift
        if min(x.shape[2:4]) <= window:
            window, shift = min(x.shape[2:4]), 0
        parts = (self.norm1, self.q, self.k, self.v, self.proj, self.norm2, self.fc1, self.fc2)
        weights = ops.SpatialAggregationWeights(*(tensor for part in parts for tensor in (part.weight, part.bias)))
        sizes = {"heads": self.heads, "window": window, "shift": shift}
        return ops.spatial_aggregation(x, guidance, weights, **sizes, prepare=self.prepared)


class SpatialAggregation(nn.Module):
    """A plain and a shifted block that share one norm of the guidance (CAT-Seg, section 3.3)."""

    def __init__(self, channels: int, guidance: int, heads: int, window: int) -> None:
        super().__init__()
        self.guidance_norm = nn.LayerNorm(guidance)
        self.blocks = nn.ModuleList(
            SpatialBlock(channels, guidance, heads, window, shift) for shift in (0, window // 2)
        )

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """(B, T, H, W, C) and guidance (B, H, W, G) -> (B, T, H, W, C)."""
        guidance = self.guidance_norm(guidance)
        if not recompute.recomputes(x):
            return self._blocks(x, guidance)
        batch, classes, height, width, _ = x.shape
        tiles = x.split(tile_size(classes, batch * height * width, x.device), 1)
        return torch.cat([recompute.recomputed(self, self._blocks, tile, guidance) for tile in tiles], 1)

    def _blocks(self, x: Tensor, guidance: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, guidance)
        return x
