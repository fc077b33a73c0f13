"""Random calls of every operator: a builder each, whose arguments are the sizes. `samples.py` is their table."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments
Build = Callable[["Draw"], Call]


class Draw:
    """Random tensors of one dtype on one device."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str) -> None:
        self.generator, self.dtype, self.device = generator, dtype, device

    def __call__(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        drawn = torch.randn(shape, generator=self.generator, device=self.generator.device)
        return drawn.to(self.device, self.dtype)

    def weight(self, *shape: int) -> Tensor:
        """A weight (out, in, ...) that keeps the variance."""
        return self(*shape) / math.sqrt(max(math.prod(shape[1:]), 1))

    def norm(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of a normalisation."""
        return 1 + 0.1 * self(*shape), 0.1 * self(*shape)

    def linear(self, out: int, into: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of a linear layer."""
        return self.weight(out, into), 0.1 * self(out)


def cost_volume(
    *,
    batch: int = 1,
    classes: int = 3,
    prompts: int = 1,
    height: int = 4,
    width: int = 4,
    channels: int = 8,
    per_image: bool = False,
) -> Build:
    def build(draw: Draw) -> Call:
        text = (batch,) if per_image else ()
        return (draw(batch, height, width, channels), draw(*text, classes, prompts, channels)), {}

    return build


def cost_embedding(*, out: int = 6, kernel: int = 7, prompts: int = 1, **sizes: Any) -> Build:
    def build(draw: Draw) -> Call:
        inputs, _ = cost_volume(prompts=prompts, **sizes)(draw)
        # Cosines are small, so a larger weight keeps the embedding from vanishing next to its bias.
        return (*inputs, 10 * draw.weight(out, prompts, kernel, kernel), 0.1 * draw(out)), {}

    return build


def embed_volume(
    *,
    batch: int = 1,
    classes: int = 3,
    prompts: int = 1,
    height: int = 4,
    width: int = 4,
    out: int = 6,
    kernel: int = 7,
) -> Build:
    def build(draw: Draw) -> Call:
        volume = draw(batch, classes, height, width, prompts)
        return (volume, draw.weight(out, prompts, kernel, kernel), 0.1 * draw(out)), {}

    return build


def spatial_aggregation(
    *,
    batch: int = 1,
    classes: int = 3,
    height: int = 8,
    width: int = 8,
    channels: int = 8,
    guidance: int = 6,
    hidden: int | None = None,
    heads: int = 2,
    window: int = 4,
    shift: int = 0,
) -> Build:
    def build(draw: Draw) -> Call:
        c, m = channels, hidden or 4 * channels
        parts = (
            draw.norm(c),
            draw.linear(c, c + guidance),
            draw.linear(c, c + guidance),
            draw.linear(c, c),
            draw.linear(c, c),
            draw.norm(c),
            draw.linear(m, c),
            draw.linear(c, m),
        )
        x, g = draw(batch, classes, height, width, c), draw(batch, height, width, guidance)
        weights = [tensor for part in parts for tensor in part]
        return (x, g, *weights), {"heads": heads, "window": window, "shift": shift}

    return build


def class_aggregation(
    *,
    batch: int = 1,
    classes: int = 3,
    height: int = 6,
    width: int = 6,
    channels: int = 8,
    guidance: int = 6,
    hidden: int | None = None,
    heads: int = 2,
    pooling: int = 1,
    pad_length: int = 16,
    attention: str = "linear",
    per_image: bool = False,
) -> Build:
    def build(draw: Draw) -> Call:
        c, m = channels, hidden or 4 * channels
        parts = (
            draw.norm(c),
            draw.linear(c, c + guidance),
            draw.linear(c, c + guidance),
            draw.linear(c, c),
            draw.norm(c),
            draw.linear(m, c),
            draw.linear(c, m),
        )
        x = draw(batch, classes, height, width, c)
        g = draw(*((batch,) if per_image else ()), classes, guidance)
        weights = [tensor for part in parts for tensor in part]
        keywords = {"heads": heads, "pooling": pooling, "pad_length": pad_length, "attention": attention}
        return (x, g, *weights, 0.5 * draw(c), 0.5 * draw(guidance)), keywords

    return build


def guidance_term(
    *, batch: int = 1, height: int = 4, width: int = 4, up: int = 6, guidance: int = 3, out: int = 4
) -> Build:
    def build(draw: Draw) -> Call:
        maps = draw(batch, 2 * height, 2 * width, guidance)
        return (maps, 0.1 * draw(up), draw.weight(out, up + guidance, 3, 3)), {}

    return build


def upsampling_decoder(
    *,
    batch: int = 1,
    classes: int = 3,
    height: int = 4,
    width: int = 4,
    channels: int = 8,
    up: int = 6,
    guidance: int = 3,
    out: int = 4,
    groups: int = 2,
) -> Build:
    def build(draw: Draw) -> Call:
        x, term = draw(batch, classes, height, width, channels), draw(batch, 2 * height, 2 * width, out)
        up_weight = draw(channels, up, 2, 2) / math.sqrt(channels)
        conv1_weight, conv2_weight = draw.weight(out, up + guidance, 3, 3), draw.weight(out, out, 3, 3)
        weights = (up_weight, conv1_weight, *draw.norm(out), conv2_weight, *draw.norm(out))
        return (x, term, *weights), {"groups": groups}

    return build


def layer_gather(
    *, layers: int = 3, batch: int = 1, prompts: int = 2, patches: int = 5, channels: int = 8, out: int = 6
) -> Build:
    def build(draw: Draw) -> Call:
        hidden = [draw(batch, 1 + prompts + patches, channels) for _ in range(layers)]
        projection = draw(layers, channels, out) / math.sqrt(channels)
        return (hidden, patches, *draw.norm(channels), *draw.norm(layers, channels), projection), {}

    return build


def gaussian_aggregation(*, layers: int = 3, batch: int = 1, patches: int = 5, channels: int = 8) -> Build:
    def build(draw: Draw) -> Call:
        return (draw(layers, batch, patches, channels), draw(layers)), {}

    return build


def gather_stage(**sizes: Any) -> Build:
    def build(draw: Draw) -> Call:
        (hidden, *others), _ = layer_gather(**sizes)(draw)
        return (hidden, *others, draw(len(hidden))), {}

    return build


def mask_attention(
    *,
    batch: int = 1,
    classes: int = 3,
    patches: int = 5,
    channels: int = 8,
    heads: int = 2,
    scores_only: bool = False,
    return_scores: bool = True,
) -> Build:
    def build(draw: Draw) -> Call:
        queries, memory = draw(batch, classes, channels), draw(batch, patches, channels)
        linears = [tensor for _ in range(2 if scores_only else 4) for tensor in draw.linear(channels, channels)]
        keywords: dict[str, Any] = {"heads": heads}
        if not return_scores:
            keywords["return_scores"] = False
        return (queries, memory, *linears), keywords

    return build


def mask_losses(
    *,
    batch: int = 1,
    classes: int = 3,
    map_size: tuple[int, int] = (4, 4),
    size: tuple[int, int] = (8, 8),
    terms: tuple[str, ...] = ("bce", "focal", "dice"),
    ignore: int = 255,
    dtype: torch.dtype = torch.int64,
) -> Build:
    """Labels in patches, some of no class: `ignore`, or a number beyond the classes."""

    def build(draw: Draw) -> Call:
        logits = 3 * draw(batch, classes, *map_size)
        coarse = tuple(-(-side // 2) for side in size)
        labels = torch.randint(
            classes + 2, (batch, *coarse), generator=draw.generator, device=draw.generator.device
        ).to(draw.device)
        labels = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, : size[0], : size[1]]
        return (logits, labels.masked_fill(labels == classes, ignore).to(dtype)), {"terms": terms, "ignore": ignore}

    return build


def label_map(
    *,
    classes: int = 3,
    map_size: tuple[int, int] = (4, 4),
    window: tuple[int, int] = (8, 8),
    canvas: tuple[int, int] = (8, 8),
    size: tuple[int, int] = (8, 8),
    stride: tuple[int, int] = (8, 8),
    whole: bool = False,
    offset: bool = False,
    k: int | None = None,
) -> Build:
    """Windows at every `stride` pixels, the last of an axis shifted back so that it ends at the border."""

    def starts(axis: int) -> list[int]:
        room = canvas[axis] - window[axis]
        return sorted({*range(0, room + 1, stride[axis]), room})

    def build(draw: Draw) -> Call:
        positions = [(top, left) for top in starts(0) for left in starts(1)]
        keywords: dict[str, Any] = {"window": window, "canvas": canvas, "size": size}
        logits = 2 * draw(len(positions), classes, *map_size)
        if whole:
            keywords["whole"] = 2 * draw(1, classes, *map_size)
        if k is not None:
            keywords["k"] = k
        if offset:
            keywords["offset"] = 0.1 * (draw(classes) > 0).to(draw.dtype)
        return (logits, positions), keywords

    return build
