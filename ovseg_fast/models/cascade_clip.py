"""Cascade-CLIP: cascaded vision-language embeddings alignment (Li et al., ICML 2024, arXiv 2406.00670)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..layers.cascade_head import CascadeHead
from .base import AugmentationSettings, Hyperparameters, Rule, SegmentationModel, rules
from .clip import CLIP, ImageEncoder
from .sliding import resize

PIXEL_MEAN = (123.675, 116.28, 103.53)  # ImageNet's statistics of RGB in 0..255
PIXEL_STD = (58.395, 57.12, 57.375)
SEEN_OFFSET = 0.1  # as published
NO_OBJECT_WEIGHT = 0.1  # MaskFormer's weight of the class "no object"

VOC_TEMPLATES = ("a photo of a {}",)
TEMPLATES = (
    "a photo of a {}.",
    "a photo of a small {}.",
    "a photo of a medium {}.",
    "a photo of a large {}.",
    "This is a photo of a {}.",
    "This is a photo of a small {}.",
    "This is a photo of a medium {}.",
    "This is a photo of a large {}.",
    "a {} in the scene.",
    "a photo of a {} in the scene.",
    "There is a {} in the scene.",
    "There is the {} in the scene.",
    "This is a {} in the scene.",
    "This is the {} in the scene.",
    "This is one {} in the scene.",
)

EMPTY_WEIGHT = "decode_head.loss_decode.criterion.empty_weight"
UPSTREAM_RULES = (
    *rules(
        "image_encoder.",
        "backbone.",
        ("clip.*.attn.(q|k|v)_proj_weight", "{0}.attn.in_proj_weight"),
        ("clip.*", "{0}"),
        ("norm_(weight|bias)", "ln_layers.{row}.{0}"),
        ("prompt_embeddings", "prompt_embeddings", 1),
        ("*", "{0}"),
    ),
    Rule("text_encoder.*.attn.(q|k|v)_proj_weight", "text_encoder.{0}.attn.in_proj_weight"),
    Rule("text_encoder.*", "text_encoder.{0}"),
    *rules(
        "head.decoders.#.layers.#.",
        "decode_head.cascade_decoders.{0}.layers.{1}.",
        ("(q|k|v|proj).*", "multihead_attn.{2}.{3}"),
        ("unused.self_attn_(in_proj)_*", "self_attn.{2}_{3}"),
        ("unused.self_attn_(out_proj)_*", "self_attn.{2}.{3}"),
        ("unused.norm1_*", "norm1.{2}"),
        ("*", "{2}"),
    ),
    Rule("head.query_projections.#.*", "decode_head.q_projs.{0}.{1}"),
    Rule("head.stage_weights.0", "decode_head.weights_s1"),
    Rule("head.stage_weights.1", "decode_head.weights_s2"),
)


@dataclass(frozen=True)
class CascadeCLIPConfig:
    """What distinguishes one Cascade-CLIP from another; the defaults are the published COCO-Stuff model.

    Attributes:
        clip: open_clip model name or configuration dict.
        image_size: side in pixels of a training crop, of an inference window, and of the stored position embeddings.
        prompts: prompt tokens of each block (COCO-Stuff 50, PASCAL Context 35, PASCAL VOC 10).
        stages: encoder blocks (zero-based) of the stages before the last; the last stage is the last block alone.
        decoder_layers, heads, hidden, dropout: of each cascaded decoder; `dropout` also of the visual prompts.
        stride: of sliding windows, in pixels.
        training_classes: name of the vocabulary in `data.vocabularies` that the model is trained on.
        seen_offset: subtracted from the probabilities of seen classes; 0 for transductively trained models.
    """

    clip: str | Mapping[str, Any] = "ViT-B-16-quickgelu"
    image_size: int = 512
    prompts: int = 50
    stages: tuple[tuple[int, ...], ...] = ((5, 6, 7), (8, 9, 10))
    decoder_layers: int = 3
    heads: int = 8
    hidden: int = 2048
    dropout: float = 0.1
    stride: int = 426
    training_classes: str = "coco-stuff"
    seen_offset: float = SEEN_OFFSET


class ImageFeatures(NamedTuple):
    """The head's input for B images: `stages` maps (B, S, E), `global_embedding` (B, E), `grid` (rows, columns)."""

    stages: tuple[Tensor, ...]
    global_embedding: Tensor
    grid: tuple[int, int]


class PromptedImageEncoder(nn.Module):
    """CLIP's image encoder with deep visual prompts and per-layer norms and projections (Cascade-CLIP, section 3.2).

    Args:
        clip: the encoder; its position embeddings are resized to `grid` once, bilinearly.
        prompts: prompt tokens of each block. gathered: zero-based blocks, besides the last, whose outputs are gathered.
        dropout: of projected prompts, in training.
    """

    def __init__(self, clip: ImageEncoder, grid: int, prompts: int, gathered: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        width, embed_dim = clip.width, clip.embed_dim
        clip.set_grid(grid, grid, "bilinear")
        self.clip, self.gathered = clip, gathered
        self.prompt_embeddings = nn.Parameter(torch.empty(prompts, width))
        self.deep_prompt_embeddings = nn.Parameter(torch.empty(clip.layers - 1, prompts, width))
        bound = (6.0 / (3 * clip.patch**2 + width)) ** 0.5
        nn.init.uniform_(self.prompt_embeddings, -bound, bound)
        nn.init.uniform_(self.deep_prompt_embeddings, -bound, bound)
        self.prompt_proj = nn.Linear(width, width)
        self.prompt_dropout = nn.Dropout(dropout)
        self.prompt_norm = nn.LayerNorm(width, eps=1e-6)
        self.norm_weight = nn.Parameter(torch.ones(len(gathered), width))
        self.norm_bias = nn.Parameter(torch.zeros(len(gathered), width))
        self.proj_layers = nn.Parameter(width**-0.5 * torch.randn(len(gathered), width, embed_dim))

    def forward(
        self, pixels: Tensor, stage_weights: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], Tensor, tuple[int, int]]:
        """Gather the patch features of several depths.

        Args:
            pixels: (B, 3, h, w) normalised image; h and w are multiples of the patch.
            stage_weights: the Gaussian weights (L,) of each stage before the last, whose layers are consecutive in
                `gathered`; by default each layer is its own stage.

        Returns:
            A map (B, S, E) per stage, the last one of the last block alone: weighted sums over the stage's layers of
            unit-length features, or without weights the features themselves; the global embedding (B, E) of unit
            length; the grid (rows, columns) with S = rows · columns.
        """
        tokens, grid = self.clip.embed(pixels, "bilinear", class_again=True)
        outputs = []
        for index, block in enumerate(self.clip.transformer.resblocks):
            prompts = self.deep_prompt_embeddings[index - 1] if index else self.prompt_embeddings
            prompts = self.prompt_dropout(self.prompt_proj(prompts)).expand(tokens.shape[0], -1, -1)
            first = 1 + len(self.prompt_embeddings) if index else 1  # replaces the prompts of the block before
            tokens = block(torch.cat([tokens[:, :1], prompts, tokens[:, first:]], 1))
            if index in self.gathered:
                outputs.append(tokens)
        maps = self.gather(outputs, grid[0] * grid[1], stage_weights)
        post, projection = self.clip.ln_post, self.clip.proj
        norm = self.prompt_norm
        last_weights = (norm.weight, norm.bias, post.weight[None], post.bias[None], projection[None])
        last = ops.layer_gather([tokens], grid[0] * grid[1], *last_weights, shared_eps=norm.eps)
        class_token = self.clip.project(self.prompt_norm(tokens[:, 0]))
        return [*maps, *last], F.normalize(class_token, dim=-1), grid

    def gather(self, hidden: list[Tensor], patches: int, stage_weights: Sequence[Tensor] | None) -> list[Tensor]:
        """The maps of the stages before the last, from the outputs (B, N, D) of the `gathered` blocks."""
        shared = (self.prompt_norm.weight, self.prompt_norm.bias)
        own = (self.norm_weight, self.norm_bias, self.proj_layers)
        if stage_weights is None:
            return list(ops.layer_gather(hidden, patches, *shared, *own, shared_eps=self.prompt_norm.eps))
        sizes = [len(weights) for weights in stage_weights]
        maps, first = [], 0
        parts = (tensor.split(sizes) for tensor in own)
        for weights, *layers in zip(
            [*stage_weights], *parts, strict=True
        ):  # torch 2.8 traces no zip of a ParameterList
            stage = hidden[first : first + len(weights)]
            first += len(weights)
            options = {"weights": weights, "shared_eps": self.prompt_norm.eps}
            maps.append(ops.layer_gather(stage, patches, *shared, *layers, **options))
        return maps


class CascadeCLIP(SegmentationModel):
    """Prompted CLIP image encoder, frozen text encoder and the cascade head; see `CascadeCLIPConfig`.

    `text` is (T, E). The published loss is 100 × sigmoid focal loss + 1 × dice loss of the summed masks, of the seen
    classes only (`training.labels.seen_labels`). Both terms are divided by the number of ground-truth masks.
    """

    method = "cascade-clip"
    statistics = (PIXEL_MEAN, PIXEL_STD)
    templates: tuple[str, ...] = TEMPLATES
    seen_offset = SEEN_OFFSET
    hub_note = "its authors share weights elsewhere"
    upstream_rules = UPSTREAM_RULES
    upstream_derived = (EMPTY_WEIGHT,)
    mark = "image_encoder.prompt_embeddings"
    clip_prefixes = ("image_encoder.", "text_encoder.")
    # Section 3.2: the per-layer norms and projections stay as they are, although no CLIP checkpoint holds them.
    policy = "prompt"
    policies: ClassVar = {
        "prompt": "prompt",  # prompts, their projection, their norm
        "attention": r"\.attn\.[qv]_proj_weight$|prompt|^image_encoder\.(norm_weight|norm_bias|proj_layers)$",
    }
    hyperparameters = Hyperparameters(  # section 4.1; steps are 20 000 for VOC, 40 000 for Context
        learning_rate=2e-5,
        weight_decay=0.01,
        factors={"image_encoder.prompt": 10.0, "image_encoder.deep_prompt": 10.0, "head.": 10.0, "": 1.0},
        no_decay=("norm",),
        schedule="poly",
        end=1e-6,
        warmup=1500,
        warmup_ratio=1e-6,
        batch=16,
        clip="",
    )
    # A base scale of (2048, 512) for crops of 512.
    augmentation = AugmentationSettings(scales=(0.5, 2.0), longest=4.0, largest_share=0.75, flip_first=True)
    seen_only = True
    loss_weights: ClassVar = {"focal": 100.0, "dice": 1.0}
    config: CascadeCLIPConfig

    def __init__(self, config: CascadeCLIPConfig | None = None, clip_pretrained: str | Path | None = None) -> None:
        config = config or CascadeCLIPConfig()
        super().__init__(config)
        self.training_classes, self.seen_offset = config.training_classes, config.seen_offset
        if config.training_classes in ("pascal-voc", "world"):  # VOC as published; the world because it is small
            self.templates = VOC_TEMPLATES
        clip = CLIP(config.clip, clip_pretrained)
        gathered = tuple(block for stage in config.stages for block in stage)
        grid = config.image_size // clip.visual.patch
        self.image_encoder = PromptedImageEncoder(clip.visual, grid, config.prompts, gathered, config.dropout)
        self.text_encoder = clip.text
        sizes = [*(len(stage) for stage in config.stages), 1]
        self.head = CascadeHead(
            clip.visual.embed_dim, sizes, config.decoder_layers, config.heads, config.hidden, config.dropout
        )

    @property
    def stride(self) -> int:
        return self.config.stride

    def text_from_prompts(self, embeddings: Tensor) -> Tensor:
        """(T, P, E) -> (T, E): the mean over unit-length prompts, of unit length itself."""
        return F.normalize(F.normalize(embeddings, dim=-1).mean(1), dim=-1)

    def encode_pixels(self, pixels: Tensor) -> ImageFeatures:
        """(B, 3, h, w) in 0..255, sides multiples of the patch -> features."""
        patch = self.image_encoder.clip.patch
        if pixels.shape[-2] % patch or pixels.shape[-1] % patch:
            raise ValueError(
                f"images must have sides that are multiples of the {patch}-pixel patch, got {tuple(pixels.shape[-2:])}."
            )
        stages, global_embedding, grid = self.image_encoder(self.normalise(pixels), self.head.stage_weights)
        return ImageFeatures(tuple(stages), global_embedding, grid)

    def decode(self, features: ImageFeatures, text: Tensor) -> Tensor:
        """Mask logits (B, T, H, W) at the encoder's grid, of classes (T, E).

        Raises:
            ValueError: `text` has another rank or width, or no class.
        """
        width = self.text_encoder.embed_dim
        if text.dim() != 2 or text.shape[1] != width or not text.shape[0]:
            raise ValueError(f"text must have shape (T, {width}) with T of at least 1, got {tuple(text.shape)}.")
        masks = self.head(features.stages, features.global_embedding, text)
        return masks.unflatten(-1, features.grid)

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """Mask logits (B, T, h, w) at the image's size, whose sides must be multiples of the patch (published: 512 ×
        512); arguments and errors as `SegmentationModel.forward`."""
        return resize(super().forward(images, text), *images.shape[-2:])

    def dense_embeddings(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Those of the last stage, the last block of the encoder."""
        features = self.encode_pixels(self.windows(image, "whole").pixels)
        return features.stages[-1].unflatten(1, features.grid), (image.shape[1], image.shape[2])

    def scores(self, score_map: Tensor) -> Tensor:
        """Scores (T, H, W) in 0..1 from `ops.score_map`: softmax over the classes, as published."""
        return score_map.softmax(0)

    def upstream_buffers(self) -> dict[str, Tensor]:
        """The weights of the training loss's classes."""
        weight = self.pixel_mean.new_ones(len(self.trained_on) + 1)
        weight[-1] = NO_OBJECT_WEIGHT
        return {EMPTY_WEIGHT: weight}
