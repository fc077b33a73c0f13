"""Samples of spatial_aggregation: how a call is built from sizes, and the rows."""

from __future__ import annotations

from ovseg_fast import ops

from ._sample import PUBLISHED_CATSEG, WIDE, Build, Call, Draw, row


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
        x, g = draw.tokens(batch, classes, height, width, c), draw(batch, height, width, guidance)
        weights = ops.SpatialAggregationWeights(*(tensor for part in parts for tensor in part))
        return (x, g, weights), {"heads": heads, "window": window, "shift": shift}

    return build


SPATIAL_AGGREGATION = [
    row(
        "spatial_aggregation",
        "usual",
        spatial_aggregation(classes=2, height=12, width=6, channels=32, heads=4, window=6),
    ),
    row(
        "spatial_aggregation",
        "small",
        spatial_aggregation(classes=2, height=4, width=4, channels=12, guidance=4, hidden=9, window=2),
        "small",
    ),
    row(
        "spatial_aggregation",
        "small, shifted, in whole windows",
        spatial_aggregation(classes=2, height=4, width=8, channels=12, guidance=4, hidden=9, window=4, shift=1),
        "small",
        "odd",
    ),
    row(
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
    row(
        "spatial_aggregation",
        "shifted",
        spatial_aggregation(batch=2, classes=2, height=8, width=8, window=4, shift=2),
        "batch",
    ),
    row(
        "spatial_aggregation",
        "odd",
        spatial_aggregation(
            batch=2, classes=2, height=5, width=7, channels=15, guidance=5, hidden=13, heads=3, window=4, shift=2
        ),
        "odd",
        "batch",
    ),
    row("spatial_aggregation", "one window", spatial_aggregation(height=6, width=6, window=6)),
    row("spatial_aggregation", "one window, shifted", spatial_aggregation(height=7, width=7, window=7, shift=3), "odd"),
    row("spatial_aggregation", "wide map", spatial_aggregation(height=3, width=10, window=3, shift=1), "odd"),
    row(
        "spatial_aggregation",
        "window in two tiles",
        spatial_aggregation(classes=1, height=13, width=12, channels=12, window=12, shift=6),
        "odd",
    ),
    row(
        "spatial_aggregation",
        "largest window",
        spatial_aggregation(classes=1, height=16, width=17, channels=12, heads=1, window=16, shift=3),
        "odd",
        "one-class",
    ),
    row(
        "spatial_aggregation",
        "one patch",
        spatial_aggregation(batch=16, classes=1, height=1, width=1, heads=1, window=1),
        "one-class",
    ),
    row(
        "spatial_aggregation",
        "70 classes",
        spatial_aggregation(classes=70, height=4, width=4, heads=1),
        "many-classes",
    ),
    row("spatial_aggregation", "no image", spatial_aggregation(batch=0, shift=2), "empty"),
    row(
        "spatial_aggregation",
        "wide",
        spatial_aggregation(batch=2, classes=2, height=12, width=12, window=12, **WIDE),
        "wide",
        "batch",
    ),
    row(
        "spatial_aggregation",
        "wide, shifted, beyond the border",
        spatial_aggregation(classes=1, height=13, width=14, window=12, shift=6, **WIDE | {"hidden": 256}),
        "wide",
    ),
    row(
        "spatial_aggregation",
        "wide, small window",
        spatial_aggregation(classes=1, height=5, width=5, window=5, shift=2, **WIDE),
        "wide",
        "small",
        "odd",
    ),
    row("spatial_aggregation", "wide, no image", spatial_aggregation(batch=0, window=4, **WIDE), "wide", "empty"),
    row(
        "spatial_aggregation",
        "sixteens",
        spatial_aggregation(batch=2, height=5, width=7, channels=48, guidance=5, hidden=80, window=4, shift=2, heads=3),
        "sixteens",
        "odd",
        "batch",
    ),
    row(
        "spatial_aggregation",
        "sixteens, one token a window",
        spatial_aggregation(height=3, width=2, channels=16, hidden=16, heads=1, window=1),
        "sixteens",
        "small",
    ),
    row(
        "spatial_aggregation",
        "sixteens, wide map",
        spatial_aggregation(height=3, width=10, channels=32, hidden=144, window=3, shift=1),
        "sixteens",
        "odd",
    ),
    row(
        "spatial_aggregation",
        "sixteens, largest window",
        spatial_aggregation(
            classes=1, height=16, width=17, channels=80, hidden=272, guidance=3, heads=5, window=16, shift=3
        ),
        "sixteens",
        "odd",
        "one-class",
    ),
    row(
        "spatial_aggregation",
        "sixteens, long heads",
        spatial_aggregation(classes=2, height=7, width=7, channels=160, hidden=32, heads=1, window=7, shift=3),
        "sixteens",
        "odd",
    ),
    row(
        "spatial_aggregation",
        "sixteens, 300 classes",
        spatial_aggregation(classes=300, height=4, width=4, channels=16, hidden=32, heads=1, window=2, shift=1),
        "sixteens",
        "many-classes",
    ),
    *(
        row(
            "spatial_aggregation",
            f"shift {shift}, {classes} classes",
            spatial_aggregation(classes=classes, window=12, shift=shift, **PUBLISHED_CATSEG),
            "bench",
        )
        for shift in (0, 6)
        for classes in (20, 171)
    ),
]
