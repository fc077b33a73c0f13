"""Cost aggregator: the head of CAT-Seg, from image and text embeddings to logits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.common.aggregation import prepare_now
from .class_aggregation import ClassAggregation
from .prepared import Prepared
from .spatial_aggregation import SpatialAggregation
from .upsampling_decoder import UpsamplingDecoder

DROPPED_LOGIT = -100.0  # logit of a class that was not among the `pad_length` best of an image


class AggregationLayer(nn.Module):
    """Spatial, then class aggregation."""

    def __init__(
        self, channels: int, guidance: int, heads: int, window: int, pad_length: int, class_attention: str = "linear"
    ) -> None:
        super().__init__()
        self.spatial = SpatialAggregation(channels, guidance, heads, window)
        self.classes = ClassAggregation(channels, guidance, heads, pad_length, attention=class_attention)

    def forward(self, x: Tensor, appearance: Tensor, text: Tensor, pooling: int) -> Tensor:
        """(B, T, H, W, C), (B, H, W, G), (T, G) or (B, T, G) -> (B, T, H, W, C)."""
        return self.classes(self.spatial(x, appearance), text, pooling)


class CostAggregator(nn.Module):
    """Cost volume, its embedding, N aggregation layers and the upsampling decoder (CAT-Seg, sections 3.2 to 3.4).

    Args:
        embed_dim: E of image and text embeddings; prompts: P, prompts a class.
        channels: C of the cost embedding; guidance: G of projected appearance and text guidance.
        layers, heads, window: N aggregation layers, attention heads, side of a window in tokens.
        pad_length: the class block's fixed list length. With more classes, only the best of each image are computed.
        class_attention: `"linear"` or `"full"`, of the class block.
        decoder_appearance, decoder_guidance, decoder_channels: see `UpsamplingDecoder`.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        prompts: int,
        channels: int,
        guidance: int,
        layers: int,
        heads: int,
        window: int,
        pad_length: int,
        decoder_appearance: Sequence[int],
        decoder_guidance: Sequence[int],
        decoder_channels: Sequence[int],
        class_attention: str = "linear",
    ) -> None:
        super().__init__()
        self.pad_length = pad_length
        self.cost_embedding = nn.Conv2d(prompts, channels, 7, padding=3)
        self.appearance_projection = nn.Conv2d(embed_dim, guidance, 3, padding=1)
        self.text_projection = nn.Linear(embed_dim, guidance)
        self.layers = nn.ModuleList(
            AggregationLayer(channels, guidance, heads, window, pad_length, class_attention) for _ in range(layers)
        )
        self.decoder = UpsamplingDecoder(channels, decoder_appearance, decoder_guidance, decoder_channels)
        self.prepared = Prepared()

    def forward(
        self, image: Tensor, text: Tensor, appearance: Sequence[Tensor], pooling: int, kept: bool = False
    ) -> Tensor | ops.KeptLogits:
        """Logits of every class.

        Args:
            image: (B, H, W, E) dense image embeddings, not normalised. text: (T, P, E) text embeddings.
            appearance: guidance maps of the decoder, (B, 2H, 2W, G₁) and (B, 4H, 4W, G₂).
            pooling: side of the class block's average pooling (2 in training, 1 in the published evaluation).
            kept: with T > `pad_length` give the computed classes alone.

        Returns:
            (B, T, 4H, 4W). With T > `pad_length`, the classes whose highest cosine anywhere in the image is among the
            `pad_length` highest are computed, image by image; all others get the logit −100. The cosines are those of
            float32 or better, whatever the dtype, so that 16-bit ties do not choose the classes. With `kept`,
            `ops.KeptLogits` then.
        """
        classes = text.shape[0]
        weights = self.cost_embedding.weight, cast(Tensor, self.cost_embedding.bias)
        if classes <= self.pad_length:
            x = ops.cost_embedding(image, text, *weights)
            return self._aggregate(x, image, text, appearance, pooling)
        wide = torch.promote_types(image.dtype, torch.float32)
        with _no_autocast(image.device.type):
            volume = ops.cost_volume(image.to(wide), text.to(wide))
        best = volume.detach().amax((2, 3, 4)).topk(self.pad_length, sorted=False).indices.sort().values
        images = torch.arange(best.shape[0], device=best.device).unsqueeze(1)
        x = ops.embed_volume(volume[images, best].to(image.dtype), *weights)
        logits = self._aggregate(x, image, F.normalize(text, dim=-1)[best], appearance, pooling)
        result = ops.KeptLogits(logits, best, classes, DROPPED_LOGIT)
        return result if kept else result.dense()

    def _aggregate(self, x: Tensor, image: Tensor, text: Tensor, appearance: Sequence[Tensor], pooling: int) -> Tensor:
        guidance = F.relu(self.appearance_projection(image.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        prepare = self.prepared if text.dim() == 3 else prepare_now  # not if each image has its own classes
        text_guidance = prepare(self._text_guidance, text, *self.text_projection.parameters())
        for layer in self.layers:
            x = layer(x, guidance, text_guidance, pooling)
        return self.decoder(x, appearance)

    def _text_guidance(self, text: Tensor, *_: Tensor) -> Tensor:
        """(..., T, P, E) -> (..., T, G), from text and the projection's weights."""
        return F.relu(self.text_projection(F.normalize(text.mean(-2), dim=-1)))


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    enabled = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()
