"""Samples of cost_embedding and embed_volume: how a call is built from sizes, and the rows."""

from __future__ import annotations

from typing import Any

from ._sample import Build, Call, Draw, row
from .cost_volume import cost_volume


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


COST_EMBEDDING = [
    row("cost_embedding", "usual", cost_embedding(height=12, width=12, channels=64, out=16)),
    row(
        "cost_embedding",
        "small",
        cost_embedding(classes=4, prompts=2, height=2, width=3, channels=3, out=4, kernel=3),
        "small",
    ),
    row(
        "cost_embedding",
        "odd",
        cost_embedding(batch=2, classes=3, prompts=3, height=5, width=7, channels=33, out=5),
        "odd",
        "batch",
    ),
    # Many images, as the only cost's gradient might happen to cancel, and a relative error then says nothing.
    row("cost_embedding", "one class, one patch", cost_embedding(batch=64, classes=1, height=1, width=1), "one-class"),
    row(
        "cost_embedding",
        "300 classes",
        cost_embedding(classes=300, height=2, width=2, channels=4, kernel=3),
        "many-classes",
    ),
    row("cost_embedding", "20 prompts", cost_embedding(classes=2, prompts=20, height=3, width=5, out=17, kernel=5)),
    row("cost_embedding", "window of 11", cost_embedding(classes=6, height=3, width=2, kernel=11)),
    row("cost_embedding", "window of 1", cost_embedding(height=2, width=20, channels=5, out=130, kernel=1)),
    row(
        "cost_embedding",
        "published widths",
        cost_embedding(classes=2, height=3, width=37, channels=512, out=128),
        "wide",
    ),
    row("cost_embedding", "no image", cost_embedding(batch=0), "empty"),
    *(
        row(
            "cost_embedding",
            f"{classes} classes",
            cost_embedding(classes=classes, height=24, width=24, channels=512, out=128),
            "bench",
        )
        for classes in (20, 171)
    ),
    row("embed_volume", "small", embed_volume(classes=2, prompts=2, height=2, width=3, out=2, kernel=3), "small"),
    row("embed_volume", "odd", embed_volume(batch=2, classes=5, prompts=3, height=7, width=9, out=5), "odd", "batch"),
]
