"""Samples of gaussian_aggregation: how a call is built from sizes, and the rows."""

from __future__ import annotations

from ._sample import Build, Call, Draw, row


def gaussian_aggregation(*, layers: int = 3, batch: int = 1, patches: int = 5, channels: int = 8) -> Build:
    def build(draw: Draw) -> Call:
        return (draw(layers, batch, patches, channels), draw(layers)), {}

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
]
