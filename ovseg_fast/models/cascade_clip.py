"""Cascade-CLIP: cascaded vision-language embeddings alignment (Li et al., ICML 2024, arXiv 2406.00670)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..layers.cascade_head import CascadeHead
from .clip import CLIP, ImageEncoder
from .losses import check_labels, share_of_masks
from .sliding import Windows, resize, to_pixels, window_starts

PIXEL_MEAN = (123.675, 116.28, 103.53)  # ImageNet's statistics of RGB in 0..255
PIXEL_STD = (58.395, 57.12, 57.375)
FOCAL_WEIGHT, DICE_WEIGHT = 100.0, 1.0  # in the training loss
MAX_ASPECT = 32  # beyond this, sliding windows over one picture run into the hundreds


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
    seen_offset: float = 0.1


class ImageFeatures(NamedTuple):
    """What the head needs of B images: `stages` maps (B, S, E), `global_embedding` (B, E), and the `grid` with S
    patches."""

    stages: tuple[Tensor, ...]
    global_embedding: Tensor
    grid: tuple[int, int]


class PromptedImageEncoder(nn.Module):
    """CLIP's image encoder with deep visual prompts and per-layer norms and projections (Cascade-CLIP, section 3.2).

    Args:
        clip: the encoder; its position embeddings are resized to `grid` once, bilinearly.
        prompts: prompt tokens of each block; gathered: zero-based blocks, besides the last one, whose outputs are
            gathered.
        dropout: probability with which projected prompts are dropped in training.
    """

    def __init__(self, clip: ImageEncoder, grid: int, prompts: int, gathered: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        width, embed_dim = clip.width, clip.embed_dim
        clip.set_grid(grid, grid, "bilinear")
        self.clip = clip
        self.gathered = gathered
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
            stage_weights: the Gaussian weights (L,) of each stage before the last, whose layers follow each other in
                `gathered`; by default each layer is a stage of its own.

        Returns:
            a map (B, S, E) a stage, the last one of the last block alone: weighted sums over the stage's layers of
            features of unit length over E, the features themselves without weights; the global embedding (B, E), unit
            length; the grid (rows, columns) with S = rows · columns.
        """
        tokens, grid = self.clip.embed(pixels, "bilinear", class_again=True)
        outputs = []
        for index, block in enumerate(self.clip.transformer.resblocks):
            prompts = self.deep_prompt_embeddings[index - 1] if index else self.prompt_embeddings
            prompts = self.prompt_dropout(self.prompt_proj(prompts)).expand(tokens.shape[0], -1, -1)
            first = (
                1 if index == 0 else 1 + len(self.prompt_embeddings)
            )  # each block replaces the prompts of the one before
            tokens = block(torch.cat([tokens[:, :1], prompts, tokens[:, first:]], 1))
            if index in self.gathered:
                outputs.append(tokens)
        maps = self.gather(outputs, grid[0] * grid[1], stage_weights)
        post, projection = self.clip.ln_post, self.clip.proj
        last = ops.layer_gather(
            [tokens],
            grid[0] * grid[1],
            self.prompt_norm.weight,
            self.prompt_norm.bias,
            post.weight[None],
            post.bias[None],
            projection[None],
            shared_eps=self.prompt_norm.eps,
        )
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
        for weights, norm_weight, norm_bias, projection in zip(stage_weights, *parts, strict=True):
            stage = hidden[first : first + len(weights)]
            first += len(weights)
            maps.append(
                ops.layer_gather(
                    stage,
                    patches,
                    *shared,
                    norm_weight,
                    norm_bias,
                    projection,
                    weights=weights,
                    shared_eps=self.prompt_norm.eps,
                )
            )
        return maps


class CascadeCLIP(nn.Module):
    """Prompted CLIP image encoder, frozen text encoder and the cascade head.

    Args:
        config: see `CascadeCLIPConfig`.
        clip_pretrained: weights of CLIP by open_clip's tag or a file; None for random ones.
    """

    preset: str | None = None
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: CascadeCLIPConfig | None = None, clip_pretrained: str | Path | None = None) -> None:
        super().__init__()
        self.config = config = config or CascadeCLIPConfig()
        clip = CLIP(config.clip, clip_pretrained)
        gathered = tuple(block for stage in config.stages for block in stage)
        grid = config.image_size // clip.visual.patch
        self.image_encoder = PromptedImageEncoder(clip.visual, grid, config.prompts, gathered, config.dropout)
        self.text_encoder = clip.text
        sizes = [*(len(stage) for stage in config.stages), 1]
        self.head = CascadeHead(
            clip.visual.embed_dim, sizes, config.decoder_layers, config.heads, config.hidden, config.dropout
        )
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(T, P, 77) int64 token ids -> (T, P, E) unit-length text embeddings.

        Raises:
            TypeError, ValueError: `tokens` is not integer or has another rank.
        """
        if tokens.dim() != 3:
            raise ValueError(f"tokens must have shape (T, P, 77), got {tuple(tokens.shape)}.")
        return F.normalize(self.text_encoder(tokens), dim=-1)

    def text_from_prompts(self, embeddings: Tensor) -> Tensor:
        """What `decode` takes, (T, E), from (T, P, E): the mean over unit-length prompts, again of unit length."""
        return F.normalize(F.normalize(embeddings, dim=-1).mean(1), dim=-1)

    def encode_pixels(self, pixels: Tensor) -> ImageFeatures:
        """(B, 3, h, w) in 0..255 -> features."""
        patch = self.image_encoder.clip.patch
        if pixels.shape[-2] % patch or pixels.shape[-1] % patch:
            raise ValueError(
                f"images must have sides that are multiples of the {patch}-pixel patch, got {tuple(pixels.shape[-2:])}."
            )
        normalised = (pixels - self.pixel_mean) / self.pixel_std
        stages, global_embedding, grid = self.image_encoder(normalised, self.head.stage_weights)
        return ImageFeatures(tuple(stages), global_embedding, grid)

    def encode_image(self, images: Tensor) -> ImageFeatures:
        """(B, 3, h, w) uint8 or float in 0..1, sides multiples of the patch -> features for `decode`."""
        return self.encode_pixels(to_pixels(images))

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
        """Mask logits at the image's size.

        Args:
            images: (B, 3, h, w) uint8, or float in 0..1, RGB; sides are multiples of the patch (512 × 512 as
                published).
            text: (T, E) unit-length embeddings.

        Returns:
            (B, T, h, w).

        Raises:
            TypeError, ValueError: images or text have another dtype or shape.
        """
        return resize(self.decode(self.encode_image(images), text), *images.shape[-2:])

    def loss(self, images: Tensor, labels: Tensor, text: Tensor) -> dict[str, Tensor]:
        """The published training loss: 100 × sigmoid focal loss + 1 × dice loss of the summed masks.

        As published, the classes are the seen ones only (`training.labels.seen_labels`), and pixels of no class count
        as negatives of every class. The masks are resized from the encoder's grid to the labels, map by map; neither
        they nor one-hot targets are ever held at that size. (The published code goes by way of 512 × 512, which is the
        labels' size there.) Both terms are divided by the number of ground-truth masks; its mean over all processes
        counts where `torch.distributed` is initialised, and all of them must then call this together.

        Args:
            images: (B, 3, h, w) uint8, or float in 0..1, RGB; sides are multiples of the patch.
            labels: (B, H, W) uint8, int32 or int64 class indices; −1, or any other outside 0..T-1, is no class.
            text: (T, E) unit-length embeddings of the classes trained on.

        Returns:
            Scalars `"focal"` and `"dice"`, weighted, and their sum `"loss"`.

        Raises:
            TypeError, ValueError: images, labels or text have another dtype or shape.
        """
        check_labels(labels, images)
        masks = self.decode(self.encode_image(images), text)
        terms = ops.mask_losses(masks, labels, terms=("focal", "dice"))
        share = share_of_masks(labels, masks.shape[1])
        if share is not None:
            terms = {name: term * share for name, term in terms.items()}
        losses = {"focal": FOCAL_WEIGHT * terms["focal"], "dice": DICE_WEIGHT * terms["dice"]}
        return losses | {"loss": losses["focal"] + losses["dice"]}

    def scores(self, score_map: Tensor) -> Tensor:
        """Scores (T, H, W) in 0..1 from `ops.score_map`: softmax over the classes, as published."""
        return score_map.softmax(0)

    def windows(self, image: Tensor, mode: str) -> Windows:
        """Cut one image (3, H, W) in 0..255.

        `"slide"`: as published, shorter side resized to 512, windows of 512 at stride 426. `"whole"`: resized to 512 ×
        512 without keeping the aspect ratio, one window.

        Raises:
            ValueError: for `"slide"`, one side of the image is more than 32 times the other.
        """
        side = self.config.image_size
        height, width = image.shape[-2:]
        if mode == "whole":
            canvas = (side, side)
        else:
            if max(height, width) > MAX_ASPECT * min(height, width):
                raise ValueError(
                    f"image is {width} × {height} pixels, 'slide' takes at most {MAX_ASPECT}:1; cut it or use 'whole'."
                )
            scale = side / min(height, width)
            canvas = (max(side, int(height * scale + 0.5)), max(side, int(width * scale + 0.5)))
        resized = resize(image.unsqueeze(0), *canvas)
        positions = [
            (top, left)
            for top in window_starts(canvas[0], side, self.config.stride)
            for left in window_starts(canvas[1], side, self.config.stride)
        ]
        pixels = torch.cat([resized[..., top : top + side, left : left + side] for top, left in positions])
        return Windows(pixels, positions, (side, side), canvas)
