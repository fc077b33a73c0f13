"""The one table of sample inputs: operator tests, gradient checks, compile checks, kernels and benchmarks read it.

A row names a public function of `ovseg_fast.ops`, tells itself apart by an id, and builds the arguments of one call.
Numbers are drawn in float32 and then cast, so one seed gives a float32 and a float64 call the very same inputs.

Tags: small (cheap enough for a numerical derivative), odd (sizes that are no multiple of anything), one-class,
many-classes (300), batch, per-image (text or its guidance differs between the images), empty (no image), wide (few
tokens of the published widths, which are all that some CUDA C++ kernels take), bench (the published size).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ovseg_fast import ops
from sample_calls import (
    Build,
    Call,
    Draw,
    class_aggregation,
    cost_embedding,
    cost_volume,
    embed_volume,
    gather_stage,
    gaussian_aggregation,
    guidance_term,
    label_map,
    layer_gather,
    mask_attention,
    mask_losses,
    spatial_aggregation,
    upsampling_decoder,
)


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
    "gather_stage": "gaussian_aggregation",
    "guidance_term": "upsampling_decoder",
    "mask_scores": "mask_attention",
    "score_map": "label_map",
    "top_labels": "label_map",
}

PUBLISHED_CATSEG = {"height": 24, "width": 24, "channels": 128, "guidance": 128, "heads": 4}
WIDE = {"channels": 128, "guidance": 64, "hidden": 128, "heads": 4}
PUBLISHED_STAGE = {"layers": 3, "prompts": 50, "patches": 1024, "channels": 768, "out": 512}
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
    same = {"window": (9, 11), "canvas": (13, 14), "size": (13, 14), "stride": (4, 3)}
    many = {"map_size": (2, 2), "window": (4, 5), "canvas": (12, 13), "size": (9, 20), "stride": (3, 3)}

    def build(*, classes: int, **sizes: Any) -> Build:
        return label_map(classes=classes, k=min(classes, 3) if function == "top_labels" else None, **sizes)

    return [
        _row(function, "one window", build(classes=3)),
        _row(function, "small", build(classes=2, whole=True, offset=True, **small), "small", "odd"),
        _row(function, "enlarged", build(classes=5, size=(37, 31), **odd), "odd"),
        _row(function, "reduced", build(classes=4, size=(7, 5), whole=True, **odd), "odd"),
        _row(function, "canvas as it is", build(classes=9, map_size=(5, 6), whole=True, **same), "odd"),
        _row(function, "16 windows", build(classes=2, offset=True, **many), "odd"),
        _row(function, "one class", build(classes=1, size=(9, 9), offset=True), "one-class"),
        _row(function, "300 classes", build(classes=300, whole=True), "many-classes"),
        *(
            _row(function, f"{method}, {classes} classes", build(classes=classes, **sizes), "bench", method)
            for method, sizes in (("cat-seg", PUBLISHED_SLIDE), ("cascade-clip", PUBLISHED_CROPS))
            for classes in (20, 171)
        ),
    ]


def _attention_rows(function: str, scores_only: bool) -> list[Sample]:
    def build(**sizes: Any) -> Build:
        return mask_attention(scores_only=scores_only, **sizes)

    return [
        # Sums over fewer queries and keys can cancel further than bfloat16 holds, in PyTorch's form as in the kernels.
        _row(function, "small", build(classes=6, patches=9), "small"),
        _row(function, "odd", build(batch=2, classes=7, patches=29, channels=15, heads=3), "odd", "batch"),
        # Likewise, a score alone can cancel to nearly 0; many do not all.
        _row(function, "one class, one patch", build(batch=64, classes=1, patches=1, heads=1), "one-class", "batch"),
        _row(function, "heads of one channel", build(batch=3, classes=5, patches=150, heads=8)),
        _row(function, "300 classes", build(classes=300, patches=17, heads=2), "many-classes"),
        _row(function, "no image", build(batch=0), "empty"),
        *(
            _row(function, f"{classes} classes", build(classes=classes, patches=1024, channels=512, heads=8), "bench")
            for classes in (20, 171)
        ),
        _row(function, "8 windows", build(batch=8, classes=171, patches=1024, channels=512, heads=8), "bench"),
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
    _row("cost_volume", "one class, one patch", cost_volume(batch=64, classes=1, height=1, width=1), "one-class"),
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
        cost_embedding(classes=4, prompts=2, height=2, width=3, channels=3, out=4, kernel=3),
        "small",
    ),
    _row(
        "cost_embedding",
        "odd, text of each image",
        cost_embedding(batch=2, classes=3, prompts=3, height=5, width=7, channels=33, out=5, per_image=True),
        "odd",
        "batch",
        "per-image",
    ),
    # Many images, as the only cost's gradient might happen to cancel, and a relative error then says nothing.
    _row("cost_embedding", "one class, one patch", cost_embedding(batch=64, classes=1, height=1, width=1), "one-class"),
    _row(
        "cost_embedding",
        "300 classes",
        cost_embedding(classes=300, height=2, width=2, channels=4, kernel=3),
        "many-classes",
    ),
    _row("cost_embedding", "20 prompts", cost_embedding(classes=2, prompts=20, height=3, width=5, out=17, kernel=5)),
    _row("cost_embedding", "window of 11", cost_embedding(classes=6, height=3, width=2, kernel=11)),
    _row("cost_embedding", "window of 1", cost_embedding(height=2, width=20, channels=5, out=130, kernel=1)),
    _row(
        "cost_embedding",
        "published widths",
        cost_embedding(classes=2, height=3, width=37, channels=512, out=128),
        "wide",
    ),
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
    _row("spatial_aggregation", "usual", spatial_aggregation(classes=2, height=12, width=6, channels=32, window=6)),
    _row(
        "spatial_aggregation",
        "small",
        spatial_aggregation(classes=2, height=4, width=4, channels=12, guidance=4, hidden=9, window=2),
        "small",
    ),
    _row(
        "spatial_aggregation",
        "small, shifted, in whole windows",
        spatial_aggregation(classes=2, height=4, width=8, channels=12, guidance=4, hidden=9, window=4, shift=1),
        "small",
        "odd",
    ),
    _row(
        "spatial_aggregation",
        "small, shifted, beyond the border",
        spatial_aggregation(
            batch=2, classes=1, height=3, width=3, channels=12, guidance=4, hidden=9, window=2, shift=1
        ),
        "small",
        "odd",
        "batch",
        "one-class",
    ),
    _row(
        "spatial_aggregation",
        "shifted",
        spatial_aggregation(batch=2, classes=2, height=8, width=8, window=4, shift=2),
        "batch",
    ),
    _row(
        "spatial_aggregation",
        "odd",
        spatial_aggregation(
            batch=2, classes=3, height=5, width=7, channels=15, guidance=5, hidden=13, heads=3, window=4, shift=2
        ),
        "odd",
        "batch",
    ),
    _row("spatial_aggregation", "one window", spatial_aggregation(height=6, width=6, window=6)),
    _row(
        "spatial_aggregation", "one window, shifted", spatial_aggregation(height=7, width=7, window=7, shift=3), "odd"
    ),
    _row("spatial_aggregation", "wide map", spatial_aggregation(height=3, width=10, window=3, shift=1), "odd"),
    _row(
        "spatial_aggregation",
        "window in two tiles",
        spatial_aggregation(classes=1, height=13, width=12, channels=12, window=12, shift=6),
        "odd",
    ),
    _row(
        "spatial_aggregation",
        "largest window",
        spatial_aggregation(classes=1, height=16, width=17, channels=12, heads=1, window=16, shift=3),
        "odd",
        "one-class",
    ),
    _row(
        "spatial_aggregation",
        "one patch",
        spatial_aggregation(batch=16, classes=1, height=1, width=1, heads=1, window=1),
        "one-class",
    ),
    _row(
        "spatial_aggregation",
        "300 classes",
        spatial_aggregation(classes=300, height=4, width=4, heads=1),
        "many-classes",
    ),
    _row("spatial_aggregation", "no image", spatial_aggregation(batch=0, shift=2), "empty"),
    _row(
        "spatial_aggregation",
        "wide",
        spatial_aggregation(batch=2, classes=2, height=12, width=12, window=12, **WIDE),
        "wide",
        "batch",
    ),
    _row(
        "spatial_aggregation",
        "wide, shifted, beyond the border",
        spatial_aggregation(classes=1, height=13, width=14, window=12, shift=6, **WIDE | {"hidden": 256}),
        "wide",
    ),
    _row(
        "spatial_aggregation",
        "wide, small window",
        spatial_aggregation(classes=1, height=5, width=5, window=5, shift=2, **WIDE),
        "wide",
        "small",
        "odd",
    ),
    _row("spatial_aggregation", "wide, no image", spatial_aggregation(batch=0, window=4, **WIDE), "wide", "empty"),
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
        class_aggregation(classes=2, height=2, width=2, channels=12, guidance=4, hidden=9, pad_length=5),
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
            channels=12,
            guidance=4,
            hidden=9,
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
        class_aggregation(batch=16, classes=1, height=1, width=1, pad_length=0),
        "one-class",
    ),
    _row(
        "class_aggregation",
        "300 classes",
        class_aggregation(classes=300, height=2, width=3, pooling=2, pad_length=256),
        "many-classes",
    ),
    _row("class_aggregation", "no image", class_aggregation(batch=0), "empty"),
    _row(
        "class_aggregation",
        "full attention, small",
        class_aggregation(
            classes=2, height=2, width=2, channels=12, guidance=4, hidden=9, pad_length=5, attention="full"
        ),
        "small",
    ),
    _row(
        "class_aggregation",
        "full attention, odd",
        class_aggregation(
            batch=2,
            classes=5,
            height=7,
            width=9,
            channels=15,
            guidance=5,
            hidden=13,
            heads=3,
            pooling=2,
            attention="full",
            per_image=True,
        ),
        "odd",
        "batch",
        "per-image",
    ),
    _row(
        "class_aggregation",
        "full attention, 300 classes",
        class_aggregation(classes=300, height=1, width=1, pad_length=256, attention="full"),
        "many-classes",
    ),
    _row(
        "class_aggregation",
        "full attention, no image",
        class_aggregation(batch=0, attention="full"),
        "empty",
    ),
    _row("class_aggregation", "wide", class_aggregation(classes=20, height=2, width=3, pad_length=256, **WIDE), "wide"),
    _row(
        "class_aggregation",
        "wide, few classes",
        class_aggregation(classes=2, height=2, width=2, pad_length=5, **WIDE),
        "wide",
        "small",
    ),
    _row(
        "class_aggregation",
        "wide, pooled, guidance of each image",
        class_aggregation(batch=2, classes=17, height=3, width=5, pooling=2, per_image=True, **WIDE),
        "wide",
        "small",
        "odd",
        "batch",
        "per-image",
    ),
    _row(
        "class_aggregation",
        "wide, one class",
        class_aggregation(batch=3, classes=1, height=1, width=1, pad_length=2, **WIDE),
        "wide",
        "one-class",
    ),
    _row(
        "class_aggregation",
        "wide, a list in two turns",
        class_aggregation(classes=200, height=1, width=2, pooling=1, pad_length=256, **WIDE),
        "wide",
    ),
    _row("class_aggregation", "wide, no image", class_aggregation(batch=0, **WIDE), "wide", "empty"),
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
    *(
        _row(
            "class_aggregation",
            f"full attention, {classes} classes",
            class_aggregation(classes=classes, pad_length=256, attention="full", **PUBLISHED_CATSEG),
            "bench",
        )
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
        upsampling_decoder(classes=2, height=4, width=4, channels=4, up=3, guidance=2, out=6, groups=2),
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
    _row("upsampling_decoder", "300 classes", upsampling_decoder(classes=300, height=2, width=2), "many-classes"),
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
    _row("layer_gather", "small", layer_gather(layers=2, patches=4, channels=12, out=10), "small"),
    _row(
        "layer_gather",
        "odd",
        layer_gather(layers=7, batch=2, prompts=5, patches=29, channels=33, out=15),
        "odd",
        "batch",
    ),
    _row("layer_gather", "one layer, patches only", layer_gather(layers=1, prompts=-1, patches=1)),
    _row("layer_gather", "more layers than a launch takes", layer_gather(layers=9, batch=2, out=17), "batch"),
    _row("layer_gather", "wide", layer_gather(layers=2, patches=17, channels=40, out=1000)),
    _row("layer_gather", "wide, published", layer_gather(layers=2, patches=40, channels=768, out=512), "wide"),
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
    # gather_stage
    _row("gather_stage", "usual", gather_stage(patches=16, channels=32, out=16)),
    _row("gather_stage", "small", gather_stage(patches=4, channels=12, out=10), "small"),
    _row(
        "gather_stage",
        "odd",
        gather_stage(layers=5, batch=2, prompts=5, patches=29, channels=33, out=15),
        "odd",
        "batch",
    ),
    _row("gather_stage", "more layers than a launch takes", gather_stage(layers=9, batch=2, out=17), "batch"),
    _row("gather_stage", "wide, published", gather_stage(patches=17, channels=768, out=512), "wide"),
    _row("gather_stage", "wide, more columns", gather_stage(layers=2, patches=19, channels=200, out=768), "wide"),
    _row("gather_stage", "no image", gather_stage(batch=0), "empty"),
    *(
        _row("gather_stage", f"published{words}", gather_stage(batch=batch, **PUBLISHED_STAGE), "bench")
        for words, batch in (("", 1), (", 4 images", 4))
    ),
    # mask_attention and mask_scores
    *_attention_rows("mask_attention", scores_only=False),
    _row(
        "mask_attention",
        "small, no scores",
        mask_attention(classes=6, patches=9, return_scores=False),
        "small",
    ),
    *_attention_rows("mask_scores", scores_only=True),
    # mask_losses
    _row("mask_losses", "usual", mask_losses(classes=5, map_size=(3, 3), size=(12, 12), terms=("bce",))),
    _row("mask_losses", "small", mask_losses(classes=2, map_size=(2, 3), size=(3, 4)), "small"),
    _row("mask_losses", "small, of one size", mask_losses(batch=2, map_size=(2, 2), size=(2, 2), ignore=1), "small"),
    _row(
        "mask_losses",
        "odd",
        mask_losses(batch=2, classes=5, map_size=(4, 6), size=(7, 9), dtype=torch.int32),
        "odd",
        "batch",
    ),
    _row(
        "mask_losses",
        "reduced, bytes",
        mask_losses(batch=2, classes=3, map_size=(8, 7), size=(5, 4), terms=("dice", "bce"), dtype=torch.uint8),
        "odd",
        "batch",
    ),
    _row(
        "mask_losses",
        "enlarged one way, reduced the other",
        mask_losses(classes=4, map_size=(3, 37), size=(13, 7), terms=("focal",), ignore=-1),
        "odd",
    ),
    _row("mask_losses", "one class, one pixel", mask_losses(classes=1, map_size=(1, 1), size=(3, 2)), "one-class"),
    _row("mask_losses", "300 classes", mask_losses(classes=300, map_size=(1, 2), size=(2, 2)), "many-classes"),
    _row("mask_losses", "no image", mask_losses(batch=0), "empty"),
    *(
        _row(
            "mask_losses",
            f"{method}, {classes} classes",
            mask_losses(batch=4, classes=classes, map_size=(side, side), size=(full, full), terms=terms),
            "bench",
            method,
        )
        for method, side, full, terms, counts in (
            ("cat-seg", 96, 384, ("bce",), (20, 171)),
            ("cascade-clip", 32, 512, ("focal", "dice"), (15, 156)),
        )
        for classes in counts
    ),
    # label_map, score_map and top_labels
    *_label_rows("label_map"),
    *_label_rows("score_map"),
    *_label_rows("top_labels"),
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


def map_floating(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`function` of every floating-point tensor in a call or a part of one; labels and all else stay."""
    return map_tensors(lambda tensor: function(tensor) if tensor.is_floating_point() else tensor, value)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in a call or in a result, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return found


def floating(value: Any) -> list[Tensor]:
    """Every floating-point tensor in a call or in a result, in order."""
    return [tensor for tensor in tensors(value) if tensor.is_floating_point()]


def arguments(function: str, call: Call) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(inspect.signature(getattr(ops, function)).bind(*call[0], **call[1]).arguments)
