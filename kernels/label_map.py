"""Label map.

    p_n    = sigmoid(resize(logits_n, window)) − offset
    canvas = mean of p_n over the windows n that hold the pixel
    canvas = ½ (canvas + resize(sigmoid(resize(whole, window)), canvas))     if logits of the whole image are given
    scores = resize(canvas, size),   the best k classes of every pixel, or all of them

A program labels one tile of output pixels. It loops over the classes a few at a time, reads the logits below its tile
from the cache and keeps the best k scores of each pixel in registers; nothing else is stored. It skips classes whose
largest logits below the tile rule them out; the most promising ones come first, so in a photograph it skips most.
Sums and products are float32. There is no backward: labels have no gradient.

Scores are compared as int64 keys that sort like them, NaN first, the lower class first among equals:
key(score) · 2³² + (2³¹ − 1 − class).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import block, cdiv, launch

# Classes per step, which share source pixels and weights, and the tile of pixels, one row for each warp.
TILES = {"CLASSES": 8, "ROWS": 8, "COLUMNS": 32}
WARPS = 8
PLACES = 8  # positions that one launch of `_place` writes

PATCH_ROWS = tl.constexpr(4)  # of the logits that are read at a time for the maximum
PATCH_COLUMNS = tl.constexpr(16)
SLACK = tl.constexpr(1e-5)  # how far rounding may lift a score above its bound
LOWEST = tl.constexpr(-(2**63))
LAST = tl.constexpr(2**31 - 1)
INFINITY = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=[f"place{i}" for i in range(PLACES)])
def _place(places, start, windows, place0, place1, place2, place3, place4, place5, place6, place7):
    """Write positions that come as arguments: nothing waits for a copy from the host, and a CUDA graph holds them."""
    i = tl.arange(0, 8)
    value = tl.where(i == 0, place0, place1)
    value = tl.where(i == 2, place2, value)
    value = tl.where(i == 3, place3, value)
    value = tl.where(i == 4, place4, value)
    value = tl.where(i == 5, place5, value)
    value = tl.where(i == 6, place6, value)
    value = tl.where(i == 7, place7, value)
    tl.store(places + start + i, value, mask=start + i < windows)


@triton.jit
def _taps(pixel, scale, size):
    """The two source pixels that a resizing reads for a pixel, and the weight of the second; as PyTorch has them."""
    source = tl.maximum((pixel.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    low = tl.minimum(source.to(tl.int32), size - 1)
    return low, tl.minimum(low + 1, size - 1), source - low.to(tl.float32)


@triton.jit
def _source_range(first, last, scale, size):
    """The first and the last source pixel that a resizing reads for the pixels from `first` to `last`."""
    low, _, _ = _taps(first, scale, size)
    _, high, _ = _taps(last, scale, size)
    return low, high


@triton.jit
def _probabilities(maps, y, x, mask, height, width, scale_y, scale_x, RESIZE: tl.constexpr):
    """sigmoid(resize(maps, window)) at the window's pixels (y, x): maps (CLASSES, 1) pointers -> (CLASSES, PIXELS)."""
    if RESIZE:
        above, below, down = _taps(y, scale_y, height)
        left, right, along = _taps(x, scale_x, width)
        a = tl.load(maps + (above * width + left)[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(maps + (above * width + right)[None, :], mask=mask, other=0.0).to(tl.float32)
        c = tl.load(maps + (below * width + left)[None, :], mask=mask, other=0.0).to(tl.float32)
        d = tl.load(maps + (below * width + right)[None, :], mask=mask, other=0.0).to(tl.float32)
        upper = (1.0 - along)[None, :] * a + along[None, :] * b
        lower = (1.0 - along)[None, :] * c + along[None, :] * d
        logit = (1.0 - down)[None, :] * upper + down[None, :] * lower
    else:
        logit = tl.load(maps + (y * width + x)[None, :], mask=mask, other=0.0).to(tl.float32)
    return 1.0 / (1.0 + tl.exp(-logit))


@triton.jit
def _corner(corner, y, x, scale_y, scale_x, height, width, RESIZE: tl.constexpr):
    """One of the four source pixels 0..3 that a resizing reads, and its weight; without RESIZE the pixel itself."""
    weight = tl.full(y.shape, 1.0, tl.float32)
    if RESIZE:
        above, below, down = _taps(y, scale_y, height)
        left, right, along = _taps(x, scale_x, width)
        y = tl.where(corner // 2 == 1, below, above)
        x = tl.where(corner % 2 == 1, right, left)
        weight = tl.where(corner // 2 == 1, down, 1.0 - down) * tl.where(corner % 2 == 1, along, 1.0 - along)
    return y, x, weight


@triton.jit
def _window(place, canvas_width, window_height, window_width, top, left, bottom, right):
    """Row and column of the window at `place`, and whether it meets the rectangle of the canvas."""
    y = (tl.load(place) // canvas_width).to(tl.int32)
    x = (tl.load(place) % canvas_width).to(tl.int32)
    return y, x, (y <= bottom) & (y + window_height > top) & (x <= right) & (x + window_width > left)


@triton.jit
def _canvas(
    logits, whole, offset, places, k, start, classes, y, x, top, left, bottom, right,
    windows, height, width, window_height, window_width, canvas_width,
    map_scale_y, map_scale_x, whole_scale_y, whole_scale_x,
    RESIZE_MAPS: tl.constexpr, RESIZE_WHOLE: tl.constexpr,
):  # fmt: skip
    """Scores (CLASSES, PIXELS) of classes `start + k` at the canvas's pixels (y, x), all within the rectangle."""
    valid = (start + k < classes)[:, None]
    area = height * width
    acc = tl.zeros((k.shape[0], y.shape[0]), tl.float32)
    count = tl.zeros((y.shape[0],), tl.float32)
    for n in range(windows):
        from_y, from_x, meets = _window(places + n, canvas_width, window_height, window_width, top, left, bottom, right)
        if meets:
            row = y - from_y
            col = x - from_x
            inside = (row >= 0) & (row < window_height) & (col >= 0) & (col < window_width)
            maps = logits + ((n * classes + start + k).to(tl.int64) * area)[:, None]
            mask = valid & inside[None, :]
            p = _probabilities(maps, row, col, mask, height, width, map_scale_y, map_scale_x, RESIZE_MAPS)
            acc += tl.where(inside[None, :], p, 0.0)
            count += inside.to(tl.float32)
    acc *= (1.0 / count)[None, :]
    if offset is not None:
        acc -= tl.load(offset + start + k, mask=start + k < classes, other=0.0).to(tl.float32)[:, None]
    if whole is not None:
        maps = whole + ((start + k).to(tl.int64) * area)[:, None]
        value = tl.zeros_like(acc)
        for corner in range(4 if RESIZE_WHOLE else 1):
            row, col, weight = _corner(
                corner, y, x, whole_scale_y, whole_scale_x, window_height, window_width, RESIZE_WHOLE
            )
            p = _probabilities(maps, row, col, valid, height, width, map_scale_y, map_scale_x, RESIZE_MAPS)
            value += weight[None, :] * p
        acc = (acc + value) * 0.5
    return acc


@triton.jit
def _max_logits(found, maps, valid, top, left, bottom, right, width, scale_y, scale_x, height, RESIZE: tl.constexpr):
    """Maximum of `found` and the logits (CLASSES, patch) that the rectangle reads; infinity where one is not finite."""
    if RESIZE:
        top, bottom = _source_range(top, bottom, scale_y, height)
        left, right = _source_range(left, right, scale_x, width)
    patch = tl.arange(0, PATCH_ROWS * PATCH_COLUMNS)
    for first_y in range(top, bottom + 1, PATCH_ROWS):
        for first_x in range(left, right + 1, PATCH_COLUMNS):
            y = tl.minimum(first_y + patch // PATCH_COLUMNS, bottom)
            x = tl.minimum(first_x + patch % PATCH_COLUMNS, right)
            logit = tl.load(maps + (y * width + x)[None, :], mask=valid, other=0.0).to(tl.float32)
            found = tl.maximum(found, tl.where(tl.abs(logit) < INFINITY, logit, INFINITY))
    return found


@triton.jit
def _max_probability(found):
    """Bound of the probabilities from the largest logits (CLASSES, patch); infinity stays."""
    largest = tl.max(found, 1)
    return tl.where(largest < INFINITY, 1.0 / (1.0 + tl.exp(-largest)), INFINITY)


@triton.jit
def _bound(
    logits, whole, offset, places, k, start, classes, top, left, bottom, right,
    windows, height, width, window_height, window_width, canvas_width,
    map_scale_y, map_scale_x, whole_scale_y, whole_scale_x,
    RESIZE_MAPS: tl.constexpr, RESIZE_WHOLE: tl.constexpr,
):  # fmt: skip
    """Upper bound of the scores of classes `start + k` in the rectangle of the canvas, from the largest terms of their
    averages; infinity where it is unknown, −infinity beyond the last class."""
    valid = (start + k < classes)[:, None]
    area = height * width
    lowest = tl.full((k.shape[0], PATCH_ROWS * PATCH_COLUMNS), -INFINITY, tl.float32)
    found = lowest
    for n in range(windows):
        from_y, from_x, meets = _window(places + n, canvas_width, window_height, window_width, top, left, bottom, right)
        if meets:
            found = _max_logits(
                found, logits + ((n * classes + start + k).to(tl.int64) * area)[:, None], valid,
                tl.maximum(top - from_y, 0), tl.maximum(left - from_x, 0),
                tl.minimum(bottom - from_y, window_height - 1), tl.minimum(right - from_x, window_width - 1),
                width, map_scale_y, map_scale_x, height, RESIZE_MAPS,
            )  # fmt: skip
    bound = _max_probability(found)
    if offset is not None:
        bound -= tl.load(offset + start + k, mask=start + k < classes, other=0.0).to(tl.float32)
    if whole is not None:
        if RESIZE_WHOLE:
            top, bottom = _source_range(top, bottom, whole_scale_y, window_height)
            left, right = _source_range(left, right, whole_scale_x, window_width)
        found = _max_logits(
            lowest, whole + ((start + k).to(tl.int64) * area)[:, None], valid, top, left, bottom, right,
            width, map_scale_y, map_scale_x, height, RESIZE_MAPS,
        )  # fmt: skip
        bound = (bound + _max_probability(found)) * 0.5
    bound = tl.where(tl.abs(bound) < INFINITY, bound + SLACK * (1.0 + tl.abs(bound)), INFINITY)
    return tl.max(tl.where(start + k < classes, bound, -INFINITY), 0)


@triton.jit
def _to_key(score, c):
    """Integers that sort like the scores (CLASSES, PIXELS) of classes c (CLASSES, 1)."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # −0 equals 0
    key = tl.where(bits < 0, bits ^ LAST, bits)
    key = tl.where(score != score, LAST, key)
    return (key.to(tl.int64) << 32) | (c ^ LAST).to(tl.int64)


@triton.jit
def _to_score(key):
    """The score that `_to_key` was given."""
    bits = (key >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ LAST, bits).to(tl.float32, bitcast=True)


@triton.jit
def _forward(
    logits, whole, offset, places, scores, labels,
    windows, classes, height, width, window_height, window_width, canvas_height, canvas_width, out_height, out_width,
    map_scale_y, map_scale_x, whole_scale_y, whole_scale_x, scale_y, scale_x,
    RESIZE_MAPS: tl.constexpr, RESIZE_WHOLE: tl.constexpr, RESIZE_CANVAS: tl.constexpr,
    K: tl.constexpr, RANKS: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The best K classes of each pixel, in RANKS ≥ K places; or with K = 0 the scores of CLASSES classes."""
    tiles = tl.cdiv(out_height, ROWS) * tl.cdiv(out_width, COLUMNS)
    tile = tl.program_id(0) % tiles
    top = tile // tl.cdiv(out_width, COLUMNS) * ROWS
    left = tile % tl.cdiv(out_width, COLUMNS) * COLUMNS
    pixel = tl.arange(0, ROWS * COLUMNS)
    row = top + pixel // COLUMNS
    col = left + pixel % COLUMNS
    mask = (row < out_height) & (col < out_width)
    pixel_offset = row.to(tl.int64) * out_width + col

    # Pixels beyond the border repeat the last one. The rectangle of the canvas that the pixels read:
    y = tl.minimum(row, out_height - 1)
    x = tl.minimum(col, out_width - 1)
    bottom = tl.minimum(top + ROWS, out_height) - 1
    right = tl.minimum(left + COLUMNS, out_width) - 1
    if RESIZE_CANVAS:
        top, bottom = _source_range(top, bottom, scale_y, canvas_height)
        left, right = _source_range(left, right, scale_x, canvas_width)

    k = tl.arange(0, CLASSES)
    rank = tl.arange(0, RANKS)[:, None]
    best = tl.full((RANKS, ROWS * COLUMNS), LOWEST, tl.int64)
    first = -1
    threshold = -INFINITY  # the K-th best score at the pixel where it is lowest
    begin = tl.program_id(0) // tiles
    end = begin + 1
    if K > 0:
        # The step with the largest bound comes before all others, as number −1.
        first = 0
        begin = -1
        end = tl.cdiv(classes, CLASSES)
        largest_bound = -INFINITY
        for step in range(end):
            bound = _bound(
                logits, whole, offset, places, k, step * CLASSES, classes, top, left, bottom, right,
                windows, height, width, window_height, window_width, canvas_width,
                map_scale_y, map_scale_x, whole_scale_y, whole_scale_x, RESIZE_MAPS, RESIZE_WHOLE,
            )  # fmt: skip
            first = tl.where(bound > largest_bound, step, first)
            largest_bound = tl.maximum(largest_bound, bound)
    for step in range(begin, end):
        start = tl.where(step < 0, first, step) * CLASSES
        skip = step == first
        if K > 0:  # noqa: SIM102 (this half is known to the compiler)
            if (step >= 0) & (step != first):
                bound = _bound(
                    logits, whole, offset, places, k, start, classes, top, left, bottom, right,
                    windows, height, width, window_height, window_width, canvas_width,
                    map_scale_y, map_scale_x, whole_scale_y, whole_scale_x, RESIZE_MAPS, RESIZE_WHOLE,
                )  # fmt: skip
                skip = bound < threshold
        if not skip:
            score = tl.zeros((CLASSES, ROWS * COLUMNS), tl.float32)
            for corner in range(4 if RESIZE_CANVAS else 1):
                source_y, source_x, weight = _corner(
                    corner, y, x, scale_y, scale_x, canvas_height, canvas_width, RESIZE_CANVAS
                )
                score += weight[None, :] * _canvas(
                    logits, whole, offset, places, k, start, classes, source_y, source_x, top, left, bottom, right,
                    windows, height, width, window_height, window_width, canvas_width,
                    map_scale_y, map_scale_x, whole_scale_y, whole_scale_x, RESIZE_MAPS, RESIZE_WHOLE,
                )  # fmt: skip
            c = (start + k)[:, None]
            if K == 0:
                class_offset = c.to(tl.int64) * out_height * out_width
                tl.store(scores + class_offset + pixel_offset[None, :], score, mask=(c < classes) & mask[None, :])
            else:
                new = tl.where(c < classes, _to_key(score, c), LOWEST)
                merged = tl.full((RANKS, ROWS * COLUMNS), LOWEST, tl.int64)
                for r in tl.static_range(K):
                    largest = tl.maximum(tl.max(best, 0), tl.max(new, 0))[None, :]
                    merged = tl.where(rank == r, largest, merged)
                    best = tl.where(best == largest, LOWEST, best)
                    new = tl.where(new == largest, LOWEST, new)
                best = merged
                lowest = tl.min(tl.max(tl.where(rank == K - 1, best, LOWEST), 0), 0)
                threshold = tl.where(lowest == LOWEST, -INFINITY, _to_score(lowest))
    if K > 0:
        offsets = rank.to(tl.int64) * out_height * out_width + pixel_offset[None, :]
        mask = (rank < K) & mask[None, :]
        tl.store(labels + offsets, ((best & LAST) ^ LAST).to(tl.int32), mask=mask)
        if scores is not None:
            tl.store(scores + offsets, _to_score(best), mask=mask)


def label_map(
    logits: Tensor, whole: Tensor | None, offset: Tensor | None, positions: Sequence[int], sizes: Sequence[int],
    k: int, need_scores: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(N, T, h, w) -> scores and labels of the best k classes (k, H, W), or with k = 0 the scores of all (T, H, W)."""
    windows, classes, *map_size = logits.shape
    window, canvas, size = list(sizes[:2]), list(sizes[2:4]), list(sizes[4:])
    scores = logits.new_empty((k or classes, *size) if need_scores else 0)
    labels = logits.new_empty((k, *size), dtype=torch.int32)
    places = logits.new_empty(windows, dtype=torch.int64 if canvas[0] * canvas[1] >= 2**31 else torch.int32)
    pixels = [top * canvas[1] + left for top, left in zip(positions[::2], positions[1::2], strict=True)]
    for start in range(0, windows, PLACES):
        part = pixels[start : start + PLACES]
        launch(_place, (1,), places, start, windows, *part, *(PLACES - len(part)) * [0], warps=1)
    steps = [(map_size, window), (window, canvas), (canvas, size)]
    tiles = cdiv(size[0], TILES["ROWS"]) * cdiv(size[1], TILES["COLUMNS"])
    launch(
        _forward, (tiles * (1 if k else cdiv(classes, TILES["CLASSES"])),),
        logits, whole, offset, places, scores if need_scores else None, labels if k else None,
        windows, classes, *map_size, *window, *canvas, *size,
        *(before / after for step in steps for before, after in zip(*step, strict=True)),
        **{name: before != after for name, (before, after) in
           zip(("RESIZE_MAPS", "RESIZE_WHOLE", "RESIZE_CANVAS"), steps, strict=True)},
        K=k, RANKS=block(k, 1), warps=WARPS, **TILES,
    )  # fmt: skip
    return scores, labels
