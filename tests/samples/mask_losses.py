"""Samples of mask_losses: how a call is built from sizes, and the rows."""

from __future__ import annotations

import torch

from ._sample import Build, Call, Draw, row


def mask_losses(
    *,
    batch: int = 1,
    classes: int = 3,
    map_size: tuple[int, int] = (4, 4),
    size: tuple[int, int] = (8, 8),
    terms: tuple[str, ...] = ("bce", "focal", "dice"),
    no_class: int = 255,
    dtype: torch.dtype = torch.int64,
) -> Build:
    """Labels in patches, some of no class: `no_class`, or a number beyond the classes."""

    def build(draw: Draw) -> Call:
        logits = 3 * draw(batch, classes, *map_size)
        coarse = tuple(-(-side // 2) for side in size)
        labels = torch.randint(
            classes + 2, (batch, *coarse), generator=draw.generator, device=draw.generator.device
        ).to(draw.device)
        labels = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, : size[0], : size[1]]
        return (logits, labels.masked_fill(labels == classes, no_class).to(dtype)), {"terms": terms}

    return build


MASK_LOSSES = [
    row("mask_losses", "usual", mask_losses(classes=5, map_size=(3, 3), size=(12, 12), terms=("bce",))),
    row("mask_losses", "small", mask_losses(classes=2, map_size=(2, 3), size=(3, 4)), "small"),
    row("mask_losses", "small, of one size", mask_losses(batch=2, map_size=(2, 2), size=(2, 2)), "small"),
    row(
        "mask_losses",
        "odd",
        mask_losses(batch=2, classes=5, map_size=(4, 6), size=(7, 9), dtype=torch.int32),
        "odd",
        "batch",
    ),
    row(
        "mask_losses",
        "reduced, bytes",
        mask_losses(batch=2, classes=3, map_size=(8, 7), size=(5, 4), terms=("dice", "bce"), dtype=torch.uint8),
        "odd",
        "batch",
    ),
    row(
        "mask_losses",
        "enlarged one way, reduced the other",
        mask_losses(classes=4, map_size=(3, 37), size=(13, 7), terms=("focal",), no_class=-1),
        "odd",
    ),
    row("mask_losses", "one class, one pixel", mask_losses(classes=1, map_size=(1, 1), size=(3, 2)), "one-class"),
    row("mask_losses", "300 classes", mask_losses(classes=300, map_size=(1, 2), size=(2, 2)), "many-classes"),
    row("mask_losses", "no image", mask_losses(batch=0), "empty"),
    *(
        row(
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
]
