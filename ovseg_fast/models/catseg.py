"""CAT-Seg: cost aggregation for open-vocabulary segmentation (Cho et al., CVPR 2024, arXiv 2303.11797)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.cost_aggregator import CostAggregator
from ..ops.spatial_aggregation import window_layout
from .base import AugmentationSettings, Hyperparameters, Rule, SegmentationModel, refuse_tracing, rules
from .clip import CLIP
from .sliding import Windows, crops, resize

PIXEL_MEAN = (122.7709383, 116.7460125, 104.09373615)  # CLIP's statistics of RGB in 0..255
PIXEL_STD = (68.5005327, 66.6321579, 70.3231630)
TEMPLATES = ("A photo of a {} in the scene",)

PREDICTOR = "sem_seg_head.predictor."
HEAD = PREDICTOR + "transformer."
SHIFT_MASK = HEAD + "layers.{}.swin_block.block_2.attn_mask"
UPSTREAM_RULES = (
    *rules("clip.visual.", PREDICTOR + "clip_model.visual.", ("*", "{0}")),
    *rules("clip.text.", PREDICTOR + "clip_model.", ("*", "{0}")),
    *rules("clip.", PREDICTOR + "clip_model.", ("logit_scale", "logit_scale")),
    *rules(
        "aggregator.",
        HEAD,
        ("cost_embedding.*", "conv1.{0}"),
        ("appearance_projection.*", "guidance_projection.0.{0}"),
        ("text_projection.*", "text_guidance_projection.0.{0}"),
        ("decoder.guidance_projections.#.*", "decoder_guidance_projection.{0}.0.{1}"),
        ("decoder.head.*", "head.{0}"),
        ("decoder.stages.#.up.*", "decoder{next0}.up.{1}"),
        ("decoder.stages.#.conv1.*", "decoder{next0}.conv.double_conv.0.{1}"),
        ("decoder.stages.#.norm1.*", "decoder{next0}.conv.double_conv.1.{1}"),
        ("decoder.stages.#.conv2.*", "decoder{next0}.conv.double_conv.3.{1}"),
        ("decoder.stages.#.norm2.*", "decoder{next0}.conv.double_conv.4.{1}"),
    ),
    *rules(
        "aggregator.layers.#.",
        HEAD + "layers.{0}.",
        ("spatial.guidance_norm.*", "swin_block.guidance_norm.{1}"),
        ("spatial.blocks.#.(norm1|norm2).*", "swin_block.block_{next1}.{2}.{3}"),
        ("spatial.blocks.#.(q|k|v|proj).*", "swin_block.block_{next1}.attn.{2}.{3}"),
        ("spatial.blocks.#.(fc1|fc2).*", "swin_block.block_{next1}.mlp.{2}.{3}"),
        ("classes.(norm1|norm2).*", "attention.{1}.{2}"),
        ("classes.(q|k|v).*", "attention.attention.{1}.{2}"),
        ("classes.fc1.*", "attention.MLP.0.{1}"),
        ("classes.fc2.*", "attention.MLP.2.{1}"),
        ("classes.padding_token", "attention.padding_tokens", 2),
        ("classes.padding_guidance", "attention.padding_guidance", 2),
    ),
    Rule("guidance_upsample.#.*", "upsample{next0}.{1}"),
)

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
        class_attention: of the class block, "linear" as in the released models, or "full".
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
    class_attention: str = "linear"
    slide_canvas: int = 640
    slide_window: int = 384
    slide_overlap: float = 0.333

    def __post_init__(self) -> None:
        if self.class_attention not in ("linear", "full"):
            raise ValueError(f"class_attention must be 'linear' or 'full', got {self.class_attention!r}.")


class ImageFeatures(NamedTuple):
    """What the head needs of B images: `dense` (B, H, W, E), `appearance` maps (B, 2H, 2W, G₁) and (B, 4H, 4W, G₂)."""

    dense: Tensor
    appearance: tuple[Tensor, ...]


class CATSeg(SegmentationModel):
    """CLIP encoders and the cost aggregator; see `CATSegConfig`.

    `text` is (T, P, E) with the configuration's P. The published loss is the mean binary cross-entropy over all images,
    classes and pixels.
    """

    method = "cat-seg"
    statistics = (PIXEL_MEAN, PIXEL_STD)
    templates = TEMPLATES
    hub_space = "hamacojr/CAT-Seg-weights"
    upstream_rules = UPSTREAM_RULES
    upstream_derived = (SHIFT_MASK.format("#"),)
    mark = "clip.visual.conv1.weight"
    clip_prefixes = ("clip.",)
    policy = "attention"  # section 3.5
    policies: ClassVar = {"attention": r"\.attn\.[qv]_proj_weight$"}
    hyperparameters = Hyperparameters(  # section 4.1
        learning_rate=2e-4,
        weight_decay=1e-4,
        factors={"clip.": 0.01},
        no_decay=("norm", "embedding"),
        schedule="cosine",
        max_gradient_norm=0.01,
        clip="clip.",
    )
    augmentation = AugmentationSettings(fill=128)  # shorter side to the crop's size, colour distortion, flip
    small_images = 0  # seen in mode "whole", whose labels are misplaced
    config: CATSegConfig

    def __init__(self, config: CATSegConfig | None = None, clip_pretrained: str | Path | None = None) -> None:
        config = config or CATSegConfig()
        super().__init__(config)
        self.prompts_per_class = config.prompts
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
            class_attention=config.class_attention,
            decoder_appearance=config.decoder_appearance,
            decoder_guidance=config.decoder_guidance,
            decoder_channels=config.decoder_channels,
        )

    @property
    def map_size(self) -> int:
        """Side of the logit maps in pixels: four times the encoder's grid."""
        return 4 * (self.config.image_size // self.clip.visual.patch)

    @property
    def text_encoder(self) -> nn.Module:  # type: ignore[override]
        return self.clip.text

    def preprocess(self, pixels: Tensor) -> Tensor:
        """(B, 3, h, w) in 0..255 -> the encoder's input (B, 3, s, s).

        As published: normalised, padded with zeros right and below to a multiple of 32, then resized together with the
        padding, without keeping the aspect ratio.
        """
        height, width = _padded(*pixels.shape[-2:])
        padded = F.pad(self.normalise(pixels), (0, width - pixels.shape[-1], 0, height - pixels.shape[-2]))
        return resize(padded, self.config.image_size, self.config.image_size)

    def encode_pixels(self, pixels: Tensor) -> ImageFeatures:
        """(B, 3, h, w) in 0..255 -> features."""
        dense, outputs, grid = self.clip.visual.dense_features(self.preprocess(pixels), self.config.guidance_blocks)
        appearance = []
        for tokens, upsample in zip(outputs, self.guidance_upsample, strict=True):
            maps = upsample(tokens[:, 1:].transpose(1, 2).unflatten(2, grid))
            appearance.append(maps.permute(0, 2, 3, 1))
        return ImageFeatures(dense[:, 1:].unflatten(1, grid), tuple(appearance))

    def decode(
        self, features: ImageFeatures, text: Tensor, class_pooling: int | None = None, kept: bool = False
    ) -> Any:
        """Logits (B, T, 4H, 4W) of classes (T, P, E); `class_pooling` defaults to the configuration's. With `kept` and
        T > `pad_length`, `ops.KeptLogits` of those that the aggregator computes.

        Raises:
            ValueError: `text` has another rank, prompt count or width, or no class.
        """
        expected = (self.config.prompts, self.clip.text.embed_dim)
        if text.dim() != 3 or tuple(text.shape[1:]) != expected or not text.shape[0]:
            raise ValueError(
                f"text must have shape (T, {expected[0]}, {expected[1]}) with T of at least 1, got {tuple(text.shape)}."
            )
        pooling = self.config.class_pooling if class_pooling is None else class_pooling
        return self.aggregator(features.dense, text, features.appearance, pooling, kept)

    def forward(self, images: Tensor, text: Tensor, class_pooling: int | None = None) -> Tensor:
        """Logits of every class; arguments and errors as `SegmentationModel.forward`.

        Args:
            class_pooling: side of the class block's pooling; by default the configuration's.

        Returns:
            (B, T, 96, 96) at the published sizes, whatever the image's.
        """
        refuse_tracing()
        logits: Tensor = self.decode(self.encode_image(images), text, class_pooling)
        return logits

    def dense_embeddings(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        height, width = image.shape[-2:]
        return self.encode_pixels(image.unsqueeze(0)).dense, _padded(height, width)

    def windows(self, image: Tensor, mode: str) -> Windows:
        """Cut one image (3, H, W) in 0..255 as published.

        `"slide"`: resized to 640 × 640, windows of 384 at stride 256, and the whole image at 384 as a last one;
        pooling 1. `"whole"`: the image alone, pooling 2. The published code cuts the 96 × 96 map to the size of smaller
        images, which misplaces their labels; use `"slide"` for those.
        """
        config, image = self.config, image.unsqueeze(0)
        if mode == "whole":
            height, width = image.shape[-2:]
            cut = (min(height, self.map_size), min(width, self.map_size))
            if min(cut) < self.map_size:
                self.small_images += 1
                if str(self.small_images).strip("0") == "1":  # the first, the tenth, the hundredth, ...
                    what = "mode 'whole' misplaces labels of images under %d pixels, %d so far; 'slide' does not."
                    logger.warning(what, self.map_size, self.small_images)
            return Windows(image, [(0, 0)], cut, cut, cut=cut, decode={"kept": True})
        side = config.slide_window
        canvas = (config.slide_canvas, config.slide_canvas)
        parts, positions = crops(resize(image, *canvas), side, int(side * (1 - config.slide_overlap)))
        pixels = torch.cat([parts, resize(image, side, side)])
        return Windows(
            pixels, positions, (side, side), canvas, has_whole=True, decode={"class_pooling": 1, "kept": True}
        )

    def upstream_buffers(self) -> dict[str, Tensor]:
        """The masks of shifted windows."""
        config, like = self.config, self.pixel_mean
        side, window = config.image_size // self.clip.visual.patch, config.window
        if side <= window:  # one window, nothing to shift
            return {}
        mask = window_layout(side, side, window, window // 2, like.device, like.dtype)[2]
        assert mask is not None  # a shift always separates some neighbours
        return {
            SHIFT_MASK.format(layer): mask.clone(memory_format=torch.contiguous_format)
            for layer in range(config.layers)
        }


def _padded(height: int, width: int) -> tuple[int, int]:
    """The next multiples of 32."""
    return -(-height // 32) * 32, -(-width // 32) * 32
