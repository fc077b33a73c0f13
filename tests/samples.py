"""The one table of sample inputs: operator tests, gradient checks, compile checks, kernels and benchmarks read it.

A row names a public function of `ovseg_fast.ops`, tells itself apart by an id, and builds the arguments of one call.
Numbers are drawn in float32 and then cast, so one seed gives a float32 and a float64 call the very same inputs.

Tags:
    small     a handful of elements: cheap enough for a numerical derivative
    odd       sizes that are no multiple of anything
    one-class, many-classes (300), batch, per-image (text or its guidance differs between the images)
    empty     no image at all
    bench     the published size
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ovseg_fast import ops

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


# --- one builder an operator; its arguments are the sizes ---


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
        keywords = {"heads": heads, "pooling": pooling, "pad_length": pad_length}
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
        if offset:
            keywords["offset"] = 0.1 * (draw(classes) > 0).to(draw.dtype)
        return (logits, positions), keywords

    return build


# --- the table ---


@dataclass(frozen=True)
class Sample:
    """One row: `function` of `ovseg_fast.ops`, what tells the row apart, how to build its call, and its tags."""

    function: str
    name: str
    builder: Build
    tags: frozenset[str]

    @property
    def id(self) -> str:
        return f"{self.function}-{self.name}"

    @property
    def operator(self) -> str:
        """The operator that the function belongs to."""
        return HELPERS.get(self.function, self.function)

    def build(
        self,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Call:
        """Positional and keyword arguments of one call."""
        return self.builder(Draw(generator, dtype, device))

    def run(self, call: Call) -> Any:
        """The function's result."""
        return getattr(ops, self.function)(*call[0], **call[1])


HELPERS = {
    "embed_volume": "cost_embedding",
    "guidance_term": "upsampling_decoder",
    "mask_scores": "mask_attention",
    "score_map": "label_map",
}

PUBLISHED_CATSEG = {"height": 24, "width": 24, "channels": 128, "guidance": 128, "heads": 4}
PUBLISHED_SLIDE = {
    "map_size": (96, 96),
    "window": (384, 384),
    "canvas": (640, 640),
    "size": (640, 640),
    "stride": (256, 256),
    "whole": True,
}
PUBLISHED_CROPS = {
    "map_size": (32, 32),
    "window": (512, 512),
    "canvas": (512, 938),
    "size": (480, 880),
    "stride": (426, 426),
    "offset": True,
}


def _row(function: str, name: str, builder: Build, *tags: str) -> Sample:
    return Sample(function, name, builder, frozenset(tags))


def _label_rows(function: str) -> list[Sample]:
    small = {"map_size": (2, 3), "window": (4, 5), "canvas": (6, 7), "size": (5, 9), "stride": (2, 2)}
    odd = {"map_size": (5, 3), "window": (11, 9), "canvas": (23, 17), "stride": (7, 8)}
    return [
        _row(function, "one window", label_map()),
        _row(function, "small", label_map(classes=2, whole=True, offset=True, **small), "small", "odd"),
        _row(function, "enlarged", label_map(classes=5, size=(37, 31), **odd), "odd"),
        _row(function, "reduced", label_map(classes=4, size=(7, 5), whole=True, **odd), "odd"),
        _row(function, "one class", label_map(classes=1, size=(9, 9), offset=True), "one-class"),
        _row(function, "300 classes", label_map(classes=300, size=(19, 12), whole=True), "many-classes"),
        *(
            _row(function, f"{method}, {classes} classes", label_map(classes=classes, **sizes), "bench", method)
            for method, sizes in (("cat-seg", PUBLISHED_SLIDE), ("cascade-clip", PUBLISHED_CROPS))
            for classes in (20, 171)
        ),
    ]


def _attention_rows(function: str, scores_only: bool) -> list[Sample]:
    def build(**sizes: Any) -> Build:
        return mask_attention(scores_only=scores_only, **sizes)

    return [
        _row(function, "small", build(classes=2, channels=4, patches=3), "small"),
        _row(function, "odd", build(batch=2, classes=7, patches=29, channels=15, heads=3), "odd", "batch"),
        _row(function, "one class, one patch", build(classes=1, patches=1, heads=1), "one-class"),
        _row(function, "300 classes", build(classes=300, patches=17, heads=8), "many-classes"),
        _row(function, "no image", build(batch=0), "empty"),
        *(
            _row(function, f"{classes} classes", build(classes=classes, patches=1024, channels=512, heads=8), "bench")
            for classes in (20, 171)
        ),
    ]


SAMPLES = [
    # cost_volume
    _row("cost_volume", "usual", cost_volume(height=12, width=12, channels=64)),
    _row("cost_volume", "small", cost_volume(classes=2, height=2, width=2, channels=3), "small"),
    _row(
        "cost_volume",
        "small, text of each image",
        cost_volume(batch=2, classes=2, prompts=2, height=1, width=2, channels=3, per_image=True),
        "small",
        "batch",
        "per-image",
    ),
    _row("cost_volume", "odd", cost_volume(batch=2, classes=5, prompts=3, height=7, width=9, channels=33), "odd"),
    _row("cost_volume", "one class, one patch", cost_volume(classes=1, height=1, width=1), "one-class"),
    _row("cost_volume", "300 classes", cost_volume(classes=300, prompts=2), "many-classes"),
    _row("cost_volume", "no image", cost_volume(batch=0), "empty"),
    *(
        _row(
            "cost_volume",
            f"{classes} classes",
            cost_volume(classes=classes, height=24, width=24, channels=512),
            "bench",
        )
        for classes in (20, 171)
    ),
    # cost_embedding
    _row("cost_embedding", "usual", cost_embedding(height=12, width=12, channels=64, out=16)),
    _row(
        "cost_embedding",
        "small",
        cost_embedding(classes=2, prompts=2, height=2, width=3, channels=3, out=2, kernel=3),
        "small",
    ),
    _row(
        "cost_embedding",
        "odd, text of each image",
        cost_embedding(batch=2, classes=5, prompts=3, height=7, width=9, channels=33, out=5, per_image=True),
        "odd",
        "batch",
        "per-image",
    ),
    _row("cost_embedding", "one class, one patch", cost_embedding(classes=1, height=1, width=1), "one-class"),
    _row("cost_embedding", "300 classes", cost_embedding(classes=300), "many-classes"),
    _row("cost_embedding", "no image", cost_embedding(batch=0), "empty"),
    *(
        _row(
            "cost_embedding",
            f"{classes} classes",
            cost_embedding(classes=classes, height=24, width=24, channels=512, out=128),
            "bench",
        )
        for classes in (20, 171)
    ),
    # embed_volume
    _row("embed_volume", "small", embed_volume(classes=2, prompts=2, height=2, width=3, out=2, kernel=3), "small"),
    _row("embed_volume", "odd", embed_volume(batch=2, classes=5, prompts=3, height=7, width=9, out=5), "odd", "batch"),
    # spatial_aggregation
    _row("spatial_aggregation", "usual", spatial_aggregation(height=12, width=12, channels=32, window=6, heads=4)),
    _row(
        "spatial_aggregation",
        "small",
        spatial_aggregation(classes=2, height=4, width=4, channels=4, guidance=2, hidden=5, window=2),
        "small",
    ),
    _row(
        "spatial_aggregation",
        "small, shifted, beyond the border",
        spatial_aggregation(batch=2, classes=1, height=3, width=3, channels=4, guidance=2, hidden=5, window=2, shift=1),
        "small",
        "odd",
        "batch",
        "one-class",
    ),
    _row(
        "spatial_aggregation",
        "shifted",
        spatial_aggregation(batch=2, classes=5, height=12, width=8, window=4, shift=2),
        "batch",
    ),
    _row(
        "spatial_aggregation",
        "odd",
        spatial_aggregation(
            batch=2, classes=5, height=7, width=11, channels=15, guidance=5, hidden=13, heads=3, shift=2
        ),
        "odd",
        "batch",
    ),
    _row("spatial_aggregation", "one window", spatial_aggregation(height=6, width=6, window=12, shift=6)),
    _row("spatial_aggregation", "wide map", spatial_aggregation(height=3, width=10, window=4, shift=2), "odd"),
    _row("spatial_aggregation", "one patch", spatial_aggregation(classes=1, height=1, width=1, heads=1), "one-class"),
    _row("spatial_aggregation", "300 classes", spatial_aggregation(classes=300, height=4, width=4), "many-classes"),
    _row("spatial_aggregation", "no image", spatial_aggregation(batch=0, shift=2), "empty"),
    *(
        _row(
            "spatial_aggregation",
            f"shift {shift}, {classes} classes",
            spatial_aggregation(classes=classes, window=12, shift=shift, **PUBLISHED_CATSEG),
            "bench",
        )
        for shift in (0, 6)
        for classes in (20, 171)
    ),
    # class_aggregation
    _row("class_aggregation", "usual", class_aggregation(classes=20, channels=32, heads=4, pooling=2, pad_length=256)),
    _row(
        "class_aggregation",
        "small",
        class_aggregation(classes=2, height=2, width=2, channels=4, guidance=2, hidden=5, pad_length=5),
        "small",
    ),
    _row(
        "class_aggregation",
        "small, pooled, guidance of each image",
        class_aggregation(
            batch=2,
            classes=2,
            height=3,
            width=4,
            channels=4,
            guidance=2,
            hidden=5,
            pooling=2,
            pad_length=2,
            per_image=True,
        ),
        "small",
        "odd",
        "batch",
        "per-image",
    ),
    _row(
        "class_aggregation",
        "odd",
        class_aggregation(
            batch=2, classes=5, height=7, width=9, channels=15, guidance=5, hidden=13, heads=3, pooling=2
        ),
        "odd",
        "batch",
    ),
    _row("class_aggregation", "one class", class_aggregation(classes=1), "one-class"),
    _row(
        "class_aggregation",
        "one class alone",
        class_aggregation(classes=1, height=1, width=1, pad_length=0),
        "one-class",
    ),
    _row(
        "class_aggregation",
        "300 classes",
        class_aggregation(classes=300, height=4, width=4, pooling=2, pad_length=256),
        "many-classes",
    ),
    _row("class_aggregation", "no image", class_aggregation(batch=0), "empty"),
    *(
        _row(
            "class_aggregation",
            f"pooling {pooling}, {classes} classes",
            class_aggregation(classes=classes, pooling=pooling, pad_length=256, **PUBLISHED_CATSEG),
            "bench",
        )
        for pooling in (1, 2)
        for classes in (20, 171)
    ),
    # guidance_term
    _row("guidance_term", "small", guidance_term(height=1, width=2, up=2, guidance=2, out=2), "small"),
    _row("guidance_term", "odd", guidance_term(batch=2, height=3, width=5, up=7, guidance=5, out=3), "odd", "batch"),
    # upsampling_decoder
    _row("upsampling_decoder", "usual", upsampling_decoder(channels=32, up=24, guidance=8, out=16, groups=1)),
    _row(
        "upsampling_decoder",
        "small",
        upsampling_decoder(classes=2, height=2, width=2, channels=3, up=2, guidance=1, out=2, groups=1),
        "small",
    ),
    _row(
        "upsampling_decoder",
        "odd",
        upsampling_decoder(batch=2, classes=5, height=3, width=7, channels=9, up=5, guidance=4, out=6, groups=3),
        "odd",
        "batch",
    ),
    _row("upsampling_decoder", "one class, one patch", upsampling_decoder(classes=1, height=1, width=1), "one-class"),
    _row("upsampling_decoder", "300 classes", upsampling_decoder(classes=300), "many-classes"),
    _row("upsampling_decoder", "no image", upsampling_decoder(batch=0), "empty"),
    *(
        _row(
            "upsampling_decoder",
            f"stage {stage}, {classes} classes",
            upsampling_decoder(classes=classes, **sizes),
            "bench",
        )
        for stage, sizes in (
            (1, {"height": 24, "width": 24, "channels": 128, "up": 96, "guidance": 32, "out": 64, "groups": 4}),
            (2, {"height": 48, "width": 48, "channels": 64, "up": 48, "guidance": 16, "out": 32, "groups": 2}),
        )
        for classes in (20, 171)
    ),
    # layer_gather
    _row("layer_gather", "usual", layer_gather(patches=16, channels=32, out=16)),
    _row("layer_gather", "small", layer_gather(layers=2, patches=2, channels=3, out=2), "small"),
    _row(
        "layer_gather",
        "odd",
        layer_gather(layers=7, batch=2, prompts=5, patches=29, channels=33, out=15),
        "odd",
        "batch",
    ),
    _row("layer_gather", "one layer, patches only", layer_gather(layers=1, prompts=-1, patches=1)),
    _row("layer_gather", "no image", layer_gather(batch=0), "empty"),
    _row(
        "layer_gather",
        "published",
        layer_gather(layers=7, prompts=50, patches=1024, channels=768, out=512),
        "bench",
    ),
    # gaussian_aggregation
    _row("gaussian_aggregation", "usual", gaussian_aggregation(patches=64, channels=32)),
    _row("gaussian_aggregation", "small", gaussian_aggregation(patches=2, channels=3), "small"),
    _row(
        "gaussian_aggregation", "odd", gaussian_aggregation(layers=5, batch=2, patches=29, channels=33), "odd", "batch"
    ),
    _row("gaussian_aggregation", "one layer, one patch", gaussian_aggregation(layers=1, patches=1)),
    _row("gaussian_aggregation", "no image", gaussian_aggregation(batch=0), "empty"),
    _row("gaussian_aggregation", "published", gaussian_aggregation(patches=1024, channels=512), "bench"),
    # mask_attention and mask_scores
    *_attention_rows("mask_attention", scores_only=False),
    _row("mask_attention", "small, no scores", mask_attention(classes=2, channels=4, return_scores=False), "small"),
    *_attention_rows("mask_scores", scores_only=True),
    # label_map and score_map
    *_label_rows("label_map"),
    *_label_rows("score_map"),
]


def select(
    *tags: str, function: str | None = None, operator: str | None = None, without: tuple[str, ...] = ()
) -> list[Sample]:
    """The rows with all of `tags` and none of `without`."""
    rows = [
        row
        for row in SAMPLES
        if row.tags.issuperset(tags)
        and row.tags.isdisjoint(without)
        and function in (None, row.function)
        and operator in (None, row.operator)
    ]
    assert rows, f"no sample with {tags} without {without} of {function or operator}"
    return rows


# --- calls as a whole ---


def draw(build: Build, dtype: torch.dtype = torch.float64) -> Call:
    """A call drawn from PyTorch's own generator, which hypothesis resets before each example."""
    return build(Draw(torch.default_generator, dtype, "cpu"))


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`function` of every tensor in a call or a part of one; all else stays."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, item) for item in value)
    if isinstance(value, dict):
        return {name: map_tensors(function, item) for name, item in value.items()}
    return value


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in a call or in a result, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return found


def arguments(function: str, call: Call) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(inspect.signature(getattr(ops, function)).bind(*call[0], **call[1]).arguments)


# --- layouts: the same numbers with other strides ---


def transposed(tensor: Tensor) -> Tensor:
    """The same tensor with its storage in the reverse order of axes."""
    axes = tuple(reversed(range(tensor.dim())))
    return tensor.permute(axes).contiguous().permute(axes)


def strided(tensor: Tensor) -> Tensor:
    """The same tensor as every second element of a storage whose other elements are NaN, off its beginning."""
    storage = tensor.new_full((*tensor.shape, 2), float("nan"))
    storage[..., 1] = tensor
    return storage[..., 1]


LAYOUTS = {"transposed": transposed, "strided": strided}
