"""CAT-Seg: cost aggregation for open-vocabulary segmentation (Cho et al., CVPR 2024, arXiv 2303.11797)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..layers.cost_aggregator import CostAggregator
from .clip import CLIP
from .losses import check_labels
from .sliding import Windows, resize, to_pixels, window_starts

PIXEL_MEAN = (122.7709383, 116.7460125, 104.09373615)  # CLIP's statistics of RGB in 0..255
PIXEL_STD = (68.5005327, 66.6321579, 70.3231630)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CATSegConfig:
    """What distinguishes one CAT-Seg from another; the defaults are the published ViT-B/16.

    Attributes:
        clip: open_clip model name or configuration dict.
        image_size: side in pixels to which the encoder's input is resized.
        guidance_blocks: zero-based encoder blocks whose outputs guide the decoder.
        prompts: P, prompts a class.
        class_pooling: side of the class block's pooling in training; the published evaluation uses 1.
        slide_canvas, slide_window, slide_overlap: sliding-window inference, in pixels and as a fraction of the window.
        The others are described at `layers.cost_aggregator.CostAggregator`.
    """

    clip: str | Mapping[str, Any] = "ViT-B-16-quickgelu"
    image_size: int = 384
    guidance_blocks: tuple[int, int] = (3, 7)
    prompts: int = 1
    channels: int = 128
    guidance: int = 128
    layers: int = 2
    heads: int = 4
    window: int = 12
    pad_length: int = 256
    decoder_appearance: tuple[int, int] = (256, 128)
    decoder_guidance: tuple[int, int] = (32, 16)
    decoder_channels: tuple[int, int] = (64, 32)
    class_pooling: int = 2
    slide_canvas: int = 640
    slide_window: int = 384
    slide_overlap: float = 0.333


class ImageFeatures(NamedTuple):
    """What the head needs of B images: `dense` (B, H, W, E), `appearance` maps (B, 2H, 2W, G₁) and (B, 4H, 4W, G₂)."""

    dense: Tensor
    appearance: tuple[Tensor, ...]


class CATSeg(nn.Module):
    """CLIP encoders and the cost aggregator.

    Args:
        config: see `CATSegConfig`.
        clip_pretrained: weights of CLIP by open_clip's tag or a file; None for random ones.
    """

    preset: str | None = None
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: CATSegConfig | None = None, clip_pretrained: str | Path | None = None) -> None:
        super().__init__()
        self.config = config = config or CATSegConfig()
        self.clip = CLIP(config.clip, clip_pretrained)
        encoder = self.clip.visual
        self.guidance_upsample = nn.ModuleList(
            nn.ConvTranspose2d(encoder.width, channels, factor, stride=factor)
            for channels, factor in zip(config.decoder_appearance, (2, 4), strict=True)
        )
        self.aggregator = CostAggregator(
            embed_dim=encoder.embed_dim,
            prompts=config.prompts,
            channels=config.channels,
            guidance=config.guidance,
            layers=config.layers,
            heads=config.heads,
            window=config.window,
            pad_length=config.pad_length,
            decoder_appearance=config.decoder_appearance,
            decoder_guidance=config.decoder_guidance,
            decoder_channels=config.decoder_channels,
        )
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

    @property
    def map_size(self) -> int:
        """Side of the logit maps in pixels: four times the encoder's grid."""
        return 4 * (self.config.image_size // self.clip.visual.patch)

    @property
    def text_encoder(self) -> nn.Module:
        return self.clip.text

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(T, P, 77) int64 token ids -> (T, P, E) unit-length text embeddings.

        Raises:
            TypeError, ValueError: `tokens` is not integer or has another rank.
        """
        if tokens.dim() != 3:
            raise ValueError(f"tokens must have shape (T, P, 77), got {tuple(tokens.shape)}.")
        return F.normalize(self.clip.text(tokens), dim=-1)

    def text_from_prompts(self, embeddings: Tensor) -> Tensor:
        """What `decode` takes, from (T, P, E): unchanged."""
        return embeddings

    def preprocess(self, pixels: Tensor) -> Tensor:
        """(B, 3, h, w) in 0..255 -> the encoder's input (B, 3, s, s).

        As published: normalised, padded with zeros right and below to a multiple of 32, then resized as a whole without
        keeping the aspect ratio. The padding stays in the picture.
        """
        normalised = (pixels - self.pixel_mean) / self.pixel_std
        height, width = normalised.shape[-2:]
        right, below = (-(-side // 32) * 32 - side for side in (width, height))
        padded = F.pad(normalised, (0, right, 0, below))
        return resize(padded, self.config.image_size, self.config.image_size)

    def encode_pixels(self, pixels: Tensor) -> ImageFeatures:
        """(B, 3, h, w) in 0..255 -> features."""
        dense, outputs, grid = self.clip.visual.dense_features(self.preprocess(pixels), self.config.guidance_blocks)
        appearance = []
        for tokens, upsample in zip(outputs, self.guidance_upsample, strict=True):
            maps = upsample(tokens[:, 1:].transpose(1, 2).unflatten(2, grid))
            appearance.append(maps.permute(0, 2, 3, 1))
        return ImageFeatures(dense[:, 1:].unflatten(1, grid), tuple(appearance))

    def encode_image(self, images: Tensor) -> ImageFeatures:
        """(B, 3, h, w) uint8 or float in 0..1 -> features for `decode`."""
        return self.encode_pixels(to_pixels(images))

    def decode(self, features: ImageFeatures, text: Tensor, class_pooling: int | None = None) -> Tensor:
        """Logits (B, T, 4H, 4W) of classes (T, P, E); `class_pooling` defaults to the configuration's.

        Raises:
            ValueError: `text` has another rank, prompt count or width, or no class.
        """
        expected = (self.config.prompts, self.clip.text.embed_dim)
        if text.dim() != 3 or tuple(text.shape[1:]) != expected or not text.shape[0]:
            raise ValueError(
                f"text must have shape (T, {expected[0]}, {expected[1]}) with T of at least 1, got {tuple(text.shape)}."
            )
        pooling = self.config.class_pooling if class_pooling is None else class_pooling
        return self.aggregator(features.dense, text, features.appearance, pooling)

    def forward(self, images: Tensor, text: Tensor, class_pooling: int | None = None) -> Tensor:
        """Logits of every class.

        Args:
            images: (B, 3, h, w) uint8, or float in 0..1, RGB, any size.
            text: (T, P, E) unit-length embeddings.
            class_pooling: side of the class block's pooling; by default the configuration's (2 as published in
                training).

        Returns:
            (B, T, 96, 96) at the published sizes, whatever the image's.

        Raises:
            TypeError, ValueError: images or text have another dtype or shape.
        """
        return self.decode(self.encode_image(images), text, class_pooling)

    def loss(self, images: Tensor, labels: Tensor, text: Tensor) -> dict[str, Tensor]:
        """The published training loss: binary cross-entropy, mean over all images, classes and pixels.

        As published, pixels of no class are not left out: they count as negatives of every class. The logits are
        resized to the labels, map by map; neither they nor one-hot targets are ever held at that size.

        Args:
            images: (B, 3, h, w) uint8, or float in 0..1, RGB, any size.
            labels: (B, H, W) uint8, int32 or int64 class indices; −1, or any other outside 0..T-1, is no class.
            text: (T, P, E) unit-length embeddings, made with gradients where the text encoder is to be trained.

        Returns:
            Scalars `"bce"` and `"loss"`, which are the same.

        Raises:
            TypeError, ValueError: images, labels or text have another dtype or shape.
        """
        check_labels(labels, images)
        bce = ops.mask_losses(self(images, text), labels)["bce"]
        return {"bce": bce, "loss": bce}

    def scores(self, score_map: Tensor) -> Tensor:
        """Scores (T, H, W) in 0..1 from `ops.score_map`: the probabilities themselves."""
        return score_map

    def windows(self, image: Tensor, mode: str) -> Windows:
        """Cut one image (3, H, W) in 0..255 as published.

        `"slide"`: resized to 640 × 640, windows of 384 at stride 256, and the whole image at 384 as a last one;
        pooling 1. `"whole"`: the image alone, pooling 2. The published code cuts the 96 × 96 map to the image's size
        where that is smaller, which misplaces the labels of images under 96 pixels; use `"slide"` for those.
        """
        config, image = self.config, image.unsqueeze(0)
        if mode == "whole":
            height, width = image.shape[-2:]
            cut = (min(height, self.map_size), min(width, self.map_size))
            if min(cut) < self.map_size:
                logger.warning(
                    "mode 'whole' misplaces labels of images under %d pixels; 'slide' does not.", self.map_size
                )
            return Windows(image, [(0, 0)], cut, cut, cut=cut)
        side = config.slide_window
        canvas = (config.slide_canvas, config.slide_canvas)
        resized = resize(image, *canvas)
        starts = window_starts(config.slide_canvas, side, int(side * (1 - config.slide_overlap)))
        positions = [(top, left) for top in starts for left in starts]
        crops = [resized[..., top : top + side, left : left + side] for top, left in positions]
        pixels = torch.cat([*crops, resize(image, side, side)])
        return Windows(pixels, positions, (side, side), canvas, has_whole=True, decode={"class_pooling": 1})
