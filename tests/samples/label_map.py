"""Samples of label_map, score_map and top_labels: how a call is built from sizes, and the rows."""

from __future__ import annotations

from typing import Any

from ovseg_fast import ops

from ._sample import Build, Call, Draw, Sample, row

PUBLISHED_SLIDE = {
    "map_size": (96, 96),
    "window": (384, 384),
    "canvas": (640, 640),
    "size": (640, 640),
    "stride": (256, 256),
    "whole": True,
}
PUBLISHED_CROPS = {
    "map_size": (32, 32),
    "window": (512, 512),
    "canvas": (512, 938),
    "size": (480, 880),
    "stride": (426, 426),
    "offset": True,
}


def label_map(
    *,
    classes: int = 3,
    map_size: tuple[int, int] = (4, 4),
    window: tuple[int, int] = (8, 8),
    canvas: tuple[int, int] = (8, 8),
    size: tuple[int, int] = (8, 8),
    stride: tuple[int, int] = (8, 8),
    whole: bool = False,
    offset: bool = False,
    k: int | None = None,
) -> Build:
    """Windows at every `stride` pixels, the last of an axis shifted back so that it ends at the border."""

    def starts(axis: int) -> list[int]:
        room = canvas[axis] - window[axis]
        return sorted({*range(0, room + 1, stride[axis]), room})

    def build(draw: Draw) -> Call:
        positions = [(top, left) for top in starts(0) for left in starts(1)]
        keywords: dict[str, Any] = {}
        logits = 2 * draw(len(positions), classes, *map_size)
        if whole:
            keywords["whole"] = 2 * draw(1, classes, *map_size)
        if k is not None:
            keywords["k"] = k
        if offset:
            keywords["offset"] = 0.1 * (draw(classes) > 0).to(draw.dtype)
        return (logits, ops.Placement(positions, window, canvas, size)), keywords

    return build


def _label_rows(function: str) -> list[Sample]:
    small = {"map_size": (2, 3), "window": (4, 5), "canvas": (6, 7), "size": (5, 9), "stride": (2, 2)}
    odd = {"map_size": (5, 3), "window": (11, 9), "canvas": (23, 17), "stride": (7, 8)}
    same = {"window": (9, 11), "canvas": (13, 14), "size": (13, 14), "stride": (4, 3)}
    many = {"map_size": (2, 2), "window": (4, 5), "canvas": (12, 13), "size": (9, 20), "stride": (3, 3)}

    def build(*, classes: int, **sizes: Any) -> Build:
        return label_map(classes=classes, k=min(classes, 3) if function == "top_labels" else None, **sizes)

    return [
        row(function, "one window", build(classes=3)),
        row(function, "small", build(classes=2, whole=True, offset=True, **small), "small", "odd"),
        row(function, "enlarged", build(classes=5, size=(37, 31), **odd), "odd"),
        row(function, "reduced", build(classes=4, size=(7, 5), whole=True, **odd), "odd"),
        row(function, "canvas as it is", build(classes=9, map_size=(5, 6), whole=True, **same), "odd"),
        row(function, "16 windows", build(classes=2, offset=True, **many), "odd"),
        row(function, "one class", build(classes=1, size=(9, 9), offset=True), "one-class"),
        row(function, "300 classes", build(classes=300, whole=True), "many-classes"),
        *(
            row(function, f"{method}, {classes} classes", build(classes=classes, **sizes), "bench", method)
            for method, sizes in (("cat-seg", PUBLISHED_SLIDE), ("cascade-clip", PUBLISHED_CROPS))
            for classes in (20, 171)
        ),
    ]


LABEL_MAP = [
    *_label_rows("label_map"),
    *_label_rows("score_map"),
    *_label_rows("top_labels"),
]
