"""Samples of cost_volume: how a call is built from sizes, and the rows."""

from __future__ import annotations

from ._sample import Build, Call, Draw, row


def cost_volume(
    *,
    batch: int = 1,
    classes: int = 3,
    prompts: int = 1,
    height: int = 4,
    width: int = 4,
    channels: int = 8,
) -> Build:
    def build(draw: Draw) -> Call:
        return (draw(batch, height, width, channels), draw(classes, prompts, channels)), {}

    return build


COST_VOLUME = [
    row("cost_volume", "usual", cost_volume(height=12, width=12, channels=64)),
    row("cost_volume", "small", cost_volume(classes=2, height=2, width=2, channels=3), "small"),
    row(
        "cost_volume",
        "small, two images",
        cost_volume(batch=2, classes=2, prompts=2, height=1, width=2, channels=3),
        "small",
        "batch",
    ),
    row("cost_volume", "odd", cost_volume(batch=2, classes=5, prompts=3, height=7, width=9, channels=33), "odd"),
    row("cost_volume", "one class, one patch", cost_volume(batch=64, classes=1, height=1, width=1), "one-class"),
    row("cost_volume", "300 classes", cost_volume(classes=300, prompts=2), "many-classes"),
    row("cost_volume", "no image", cost_volume(batch=0), "empty"),
    *(
        row(
            "cost_volume",
            f"{classes} classes",
            cost_volume(classes=classes, height=24, width=24, channels=512),
            "bench",
        )
        for classes in (20, 171)
    ),
]
