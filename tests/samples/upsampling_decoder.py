"""Samples of guidance_term and upsampling_decoder: how a call is built from sizes, and the rows."""

from __future__ import annotations

import math

from ._sample import Build, Call, Draw, row


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


UPSAMPLING_DECODER = [
    row("guidance_term", "small", guidance_term(height=1, width=2, up=2, guidance=2, out=2), "small"),
    row("guidance_term", "odd", guidance_term(batch=2, height=3, width=5, up=7, guidance=5, out=3), "odd", "batch"),
    row("upsampling_decoder", "usual", upsampling_decoder(channels=32, up=24, guidance=8, out=16, groups=1)),
    row(
        "upsampling_decoder",
        "small",
        upsampling_decoder(classes=2, height=4, width=4, channels=4, up=3, guidance=2, out=6, groups=2),
        "small",
    ),
    row(
        "upsampling_decoder",
        "odd",
        upsampling_decoder(batch=2, classes=5, height=3, width=7, channels=9, up=5, guidance=4, out=6, groups=3),
        "odd",
        "batch",
    ),
    row("upsampling_decoder", "one class, one patch", upsampling_decoder(classes=1, height=1, width=1), "one-class"),
    row("upsampling_decoder", "300 classes", upsampling_decoder(classes=300, height=2, width=2), "many-classes"),
    row("upsampling_decoder", "no image", upsampling_decoder(batch=0), "empty"),
    *(
        row(
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
]
