"""Samples of mask_attention and mask_scores: how a call is built from sizes, and the rows."""

from __future__ import annotations

from typing import Any

from ._sample import Build, Call, Draw, Sample, row


def mask_attention(
    *,
    batch: int = 1,
    classes: int = 3,
    patches: int = 5,
    channels: int = 8,
    heads: int = 2,
    scores_only: bool = False,
) -> Build:
    def build(draw: Draw) -> Call:
        queries, memory = draw(batch, classes, channels), draw(batch, patches, channels)
        linears = [tensor for _ in range(2 if scores_only else 4) for tensor in draw.linear(channels, channels)]
        return (queries, memory, *linears), {"heads": heads}

    return build


def _attention_rows(function: str, scores_only: bool) -> list[Sample]:
    def build(**sizes: Any) -> Build:
        return mask_attention(scores_only=scores_only, **sizes)

    return [
        # Sums over fewer queries and keys can cancel further than bfloat16 holds, in PyTorch's form as in the kernels.
        row(function, "small", build(classes=6, patches=9), "small"),
        row(function, "odd", build(batch=2, classes=7, patches=29, channels=15, heads=3), "odd", "batch"),
        # Likewise, a score alone can cancel to nearly 0; many do not all.
        row(function, "one class, one patch", build(batch=64, classes=1, patches=1, heads=1), "one-class", "batch"),
        row(function, "heads of one channel", build(batch=3, classes=5, patches=150, heads=8)),
        row(function, "300 classes", build(classes=300, patches=17, heads=2), "many-classes"),
        row(function, "no image", build(batch=0), "empty"),
        *(
            row(function, f"{classes} classes", build(classes=classes, patches=1024, channels=512, heads=8), "bench")
            for classes in (20, 171)
        ),
        row(function, "8 windows", build(batch=8, classes=171, patches=1024, channels=512, heads=8), "bench"),
    ]


MASK_ATTENTION = [
    *_attention_rows("mask_attention", scores_only=False),
    *_attention_rows("mask_scores", scores_only=True),
]
