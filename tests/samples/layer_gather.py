"""Samples of layer_gather: how a call is built from sizes, and the rows."""

from __future__ import annotations

import math

from ._sample import Build, Call, Draw, row

PUBLISHED = {"prompts": 50, "patches": 1024, "channels": 768, "out": 512}


def layer_gather(
    *,
    layers: int = 3,
    batch: int = 1,
    prompts: int = 2,
    patches: int = 5,
    channels: int = 8,
    out: int = 6,
    weighted: bool = False,
) -> Build:
    """Single layers, or their weighted sum."""

    def build(draw: Draw) -> Call:
        hidden = [draw(batch, 1 + prompts + patches, channels) for _ in range(layers)]
        projection = draw(layers, channels, out) / math.sqrt(channels)
        parameters = (*draw.norm(channels), *draw.norm(layers, channels), projection)
        return (hidden, patches, *parameters), {"weights": draw(layers)} if weighted else {}

    return build


def stage(layers: int = 3, **sizes: int) -> Build:
    return layer_gather(layers=layers, **sizes, weighted=True)


# Tests that take one row of a kind take the first: the weighted sum, which does all that single layers need and more.
LAYER_GATHER = [
    row("layer_gather", "stage", stage(patches=16, channels=32, out=16)),
    row("layer_gather", "stage, small", stage(patches=4, channels=12, out=10), "small"),
    row(
        "layer_gather",
        "stage, odd",
        stage(layers=5, batch=2, prompts=5, patches=29, channels=33, out=15),
        "odd",
        "batch",
    ),
    row("layer_gather", "stage, more layers than a launch takes", stage(layers=9, batch=2, out=17), "batch"),
    row("layer_gather", "stage, wide, published", stage(patches=17, channels=768, out=512), "wide"),
    row("layer_gather", "stage, wide, more columns", stage(layers=2, patches=19, channels=200, out=768), "wide"),
    row("layer_gather", "stage, no image", stage(batch=0), "empty"),
    row("layer_gather", "usual", layer_gather(patches=16, channels=32, out=16)),
    row("layer_gather", "small", layer_gather(layers=2, patches=4, channels=12, out=10), "small"),
    row(
        "layer_gather",
        "odd",
        layer_gather(layers=7, batch=2, prompts=5, patches=29, channels=33, out=15),
        "odd",
        "batch",
    ),
    row("layer_gather", "one layer, patches only", layer_gather(layers=1, prompts=-1, patches=1)),
    row("layer_gather", "more layers than a launch takes", layer_gather(layers=9, batch=2, out=17), "batch"),
    row("layer_gather", "wide", layer_gather(layers=2, patches=17, channels=40, out=1000)),
    row("layer_gather", "wide, published", layer_gather(layers=2, patches=40, channels=768, out=512), "wide"),
    row("layer_gather", "no image", layer_gather(batch=0), "empty"),
    row("layer_gather", "published", layer_gather(layers=7, **PUBLISHED), "bench"),
    row("layer_gather", "published stage", stage(**PUBLISHED), "bench"),
    row("layer_gather", "published stage, 4 images", stage(batch=4, **PUBLISHED), "bench"),
]
