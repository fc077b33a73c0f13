"""Samples of gaussian_aggregation and gather_stage: how a call is built from sizes, and the rows."""

from __future__ import annotations

from typing import Any

from ._sample import Build, Call, Draw, row
from .layer_gather import layer_gather

PUBLISHED_STAGE = {"layers": 3, "prompts": 50, "patches": 1024, "channels": 768, "out": 512}


def gaussian_aggregation(*, layers: int = 3, batch: int = 1, patches: int = 5, channels: int = 8) -> Build:
    def build(draw: Draw) -> Call:
        return (draw(layers, batch, patches, channels), draw(layers)), {}

    return build


def gather_stage(**sizes: Any) -> Build:
    def build(draw: Draw) -> Call:
        (hidden, *others), _ = layer_gather(**sizes)(draw)
        return (hidden, *others, draw(len(hidden))), {}

    return build


GAUSSIAN_AGGREGATION = [
    row("gaussian_aggregation", "usual", gaussian_aggregation(patches=64, channels=32)),
    row("gaussian_aggregation", "small", gaussian_aggregation(patches=2, channels=3), "small"),
    row(
        "gaussian_aggregation", "odd", gaussian_aggregation(layers=5, batch=2, patches=29, channels=33), "odd", "batch"
    ),
    row("gaussian_aggregation", "one layer, one patch", gaussian_aggregation(layers=1, patches=1)),
    row("gaussian_aggregation", "no image", gaussian_aggregation(batch=0), "empty"),
    row("gaussian_aggregation", "published", gaussian_aggregation(patches=1024, channels=512), "bench"),
    row("gather_stage", "usual", gather_stage(patches=16, channels=32, out=16)),
    row("gather_stage", "small", gather_stage(patches=4, channels=12, out=10), "small"),
    row(
        "gather_stage",
        "odd",
        gather_stage(layers=5, batch=2, prompts=5, patches=29, channels=33, out=15),
        "odd",
        "batch",
    ),
    row("gather_stage", "more layers than a launch takes", gather_stage(layers=9, batch=2, out=17), "batch"),
    row("gather_stage", "wide, published", gather_stage(patches=17, channels=768, out=512), "wide"),
    row("gather_stage", "wide, more columns", gather_stage(layers=2, patches=19, channels=200, out=768), "wide"),
    row("gather_stage", "no image", gather_stage(batch=0), "empty"),
    *(
        row("gather_stage", f"published{words}", gather_stage(batch=batch, **PUBLISHED_STAGE), "bench")
        for words, batch in (("", 1), (", 4 images", 4))
    ),
]
