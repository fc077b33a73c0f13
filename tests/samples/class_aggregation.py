"""Samples of class_aggregation: how a call is built from sizes, and the rows."""

from __future__ import annotations

from ovseg_fast import ops

from ._sample import PUBLISHED_CATSEG, WIDE, Build, Call, Draw, row


def class_aggregation(
    *,
    batch: int = 1,
    classes: int = 3,
    height: int = 6,
    width: int = 6,
    channels: int = 8,
    guidance: int = 18,
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
        x = draw.tokens(batch, classes, height, width, c)
        g = draw(*((batch,) if per_image else ()), classes, guidance)
        tensors = (tensor for part in parts for tensor in part)
        weights = ops.ClassAggregationWeights(*tensors, 0.5 * draw.tokens(c), 0.5 * draw(guidance))
        keywords = {"heads": heads, "pooling": pooling, "pad_length": pad_length, "attention": attention}
        return (x, g, weights), keywords

    return build


CLASS_AGGREGATION = [
    row("class_aggregation", "usual", class_aggregation(classes=20, channels=32, heads=4, pooling=2, pad_length=256)),
    row(
        "class_aggregation",
        "small",
        class_aggregation(classes=5, height=2, width=2, channels=12, guidance=14, hidden=9, pad_length=5),
        "small",
    ),
    row(
        "class_aggregation",
        "small, pooled, guidance of each image",
        class_aggregation(
            batch=2,
            classes=4,
            height=3,
            width=4,
            channels=12,
            guidance=14,
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
    row(
        "class_aggregation",
        "odd",
        class_aggregation(
            batch=2, classes=5, height=5, width=7, channels=15, guidance=5, hidden=13, heads=3, pooling=2
        ),
        "odd",
        "batch",
    ),
    row(
        "class_aggregation",
        "one class",
        class_aggregation(batch=3, classes=1, height=3, width=4, per_image=True),
        "one-class",
    ),
    row(
        "class_aggregation",
        "one class alone",
        class_aggregation(batch=16, classes=1, height=1, width=1, pad_length=0),
        "one-class",
    ),
    row(
        "class_aggregation",
        "300 classes",
        class_aggregation(classes=300, height=2, width=3, pooling=2, pad_length=256),
        "many-classes",
    ),
    row("class_aggregation", "no image", class_aggregation(batch=0), "empty"),
    row(
        "class_aggregation",
        "full attention, small",
        class_aggregation(
            classes=5, height=2, width=2, channels=12, guidance=14, hidden=9, pad_length=5, attention="full"
        ),
        "small",
    ),
    row(
        "class_aggregation",
        "full attention, odd",
        class_aggregation(
            batch=2,
            classes=5,
            height=5,
            width=7,
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
    row(
        "class_aggregation",
        "full attention, 300 classes",
        class_aggregation(classes=300, height=1, width=1, pad_length=256, attention="full"),
        "many-classes",
    ),
    row(
        "class_aggregation",
        "full attention, no image",
        class_aggregation(batch=0, attention="full"),
        "empty",
    ),
    row("class_aggregation", "wide", class_aggregation(classes=20, height=2, width=3, pad_length=256, **WIDE), "wide"),
    row(
        "class_aggregation",
        "wide, few classes",
        class_aggregation(classes=2, height=2, width=2, pad_length=5, **WIDE),
        "wide",
        "small",
    ),
    row(
        "class_aggregation",
        "wide, pooled, guidance of each image",
        class_aggregation(batch=2, classes=17, height=3, width=5, pooling=2, per_image=True, **WIDE),
        "wide",
        "small",
        "odd",
        "batch",
        "per-image",
    ),
    row(
        "class_aggregation",
        "wide, one class",
        class_aggregation(batch=3, classes=1, height=1, width=1, pad_length=2, **WIDE),
        "wide",
        "one-class",
    ),
    row(
        "class_aggregation",
        "wide, a list in two turns",
        class_aggregation(classes=200, height=1, width=2, pooling=1, pad_length=256, **WIDE),
        "wide",
    ),
    row("class_aggregation", "wide, no image", class_aggregation(batch=0, **WIDE), "wide", "empty"),
    *(
        row(
            "class_aggregation",
            f"pooling {pooling}, {classes} classes",
            class_aggregation(classes=classes, pooling=pooling, pad_length=256, **PUBLISHED_CATSEG),
            "bench",
        )
        for pooling in (1, 2)
        for classes in (20, 171)
    ),
    *(
        row(
            "class_aggregation",
            f"full attention, {classes} classes",
            class_aggregation(classes=classes, pad_length=256, attention="full", **PUBLISHED_CATSEG),
            "bench",
        )
        for classes in (20, 171)
    ),
]
