"""Upsampling decoder: from aggregated cost tokens to one logit a class and pixel of a four times finer map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends, ops
from ..ops.common.threads import run_pieces, threads_for
from ..ops.common.tiles import tile_size
from ..ops.upsampling_decoder import joint_kernel, logit_map
from .prepared import Prepared
from .recompute import recomputed

CPU_TILES = 8  # tiles of PyTorch's at a time: kernels for CPUs work class by class, and pack the weights in each call


class DecoderStage(nn.Module):
    """Parameters of one `ops.upsampling_decoder` stage.

    Args:
        channels: C of the input; guidance: G of the projected guidance; out: D of the output. The transposed
            convolution gives C − G channels, so that with the guidance there are C again.
    """

    def __init__(self, channels: int, guidance: int, out: int) -> None:
        super().__init__()
        self.groups = max(out // 16, 1)
        self.up = nn.ConvTranspose2d(channels, channels - guidance, 2, stride=2)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(self.groups, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(self.groups, out)
        self.prepared = Prepared()

    def shared(self, guidance: Tensor) -> tuple[Tensor, Tensor]:
        """What all classes share: the term of guidance (B, 2H, 2W, G), and the joint weight of up and conv1."""
        term = ops.guidance_term(guidance, cast(Tensor, self.up.bias), self.conv1.weight)
        return term, self.prepared(joint_kernel, self.up.weight, self.conv1.weight)

    def forward(self, x: Tensor, term: Tensor, joint_weight: Tensor) -> Tensor:
        """(B, T, H, W, C) -> (B, T, 2H, 2W, D)."""
        norm1, norm2 = (self.norm1.weight, self.norm1.bias), (self.norm2.weight, self.norm2.bias)
        weights = (self.up.weight, self.conv1.weight, *norm1, self.conv2.weight, *norm2)
        return ops.upsampling_decoder(x, term, *weights, groups=self.groups, joint_weight=joint_weight)


class UpsamplingDecoder(nn.Module):
    """Two guided stages and a convolution to one logit (CAT-Seg, section 3.4).

    Args:
        channels: C of the aggregated cost tokens; out: channels after each stage.
        appearance, guidance: channels of each stage's guidance map, as the encoder gives it and projected.
    """

    def __init__(self, channels: int, appearance: Sequence[int], guidance: Sequence[int], out: Sequence[int]) -> None:
        super().__init__()
        self.guidance_projections = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1) for i, o in zip(appearance, guidance, strict=True)
        )
        widths = [channels, *out]
        self.stages = nn.ModuleList(DecoderStage(i, g, o) for i, g, o in zip(widths[:-1], guidance, out, strict=True))
        self.head = nn.Conv2d(out[-1], 1, 3, padding=1)

    def forward(self, x: Tensor, appearance: Sequence[Tensor]) -> Tensor:
        """(B, T, H, W, C) and guidance maps, (B, 2H, 2W, G₁) and (B, 4H, 4W, G₂) -> logits (B, T, 4H, 4W)."""
        shared: list[Tensor] = []
        for stage, project, maps in zip(self.stages, self.guidance_projections, appearance, strict=True):
            guidance = F.relu(project(maps.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
            shared += cast(DecoderStage, stage).shared(guidance)
        batch, classes, height, width, _ = x.shape
        size, threads = tile_size(classes, batch * height * width, x.device), threads_for(x, *shared)
        backend = backends.choose("upsampling_decoder", x, *self.parameters())
        if backend == "cpu":
            size *= CPU_TILES
        if threads > 1 and (backend != "torch" or _has_hooks(self)):
            threads = 1  # kernels have threads of their own
        tiles = x.split(size, 1)
        return torch.cat(run_pieces(lambda tile: recomputed(self, self._decode, tile, *shared), tiles, threads), 1)

    def _decode(self, x: Tensor, *shared: Tensor) -> Tensor:
        """Logits (B, t, 4H, 4W) of a tile of classes; `shared` is that of all stages."""
        for stage, term, joint_weight in zip(self.stages, shared[::2], shared[1::2], strict=True):
            x = stage(x, term, joint_weight)
        return logit_map(x, self.head.weight, cast(Tensor, self.head.bias))


def _has_hooks(module: nn.Module) -> bool:
    """Whether a hook sees the module's calls, which expects them in order and in the caller's thread."""
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    return hooked or torch.nn.modules.module._has_any_global_hook()
