"""Mask losses: sums over the pixels of each image, for each class, of logits resized to the size of a label map.

    x = Σ of the four logits around a pixel, weighted bilinearly (corners not aligned),   p = sigmoid(x)
    y = [label = t],   z = y ? −x : x,   q = sigmoid(z) = |p − y|,   α = y ? ¼ : ¾
    sums = Σ softplus(z),   Σ α·q²·softplus(z),   Σ q,   Σ p,   Σ y

Backward, from the gradients a, f, d, u of the first four sums:

    dx = (y ? −1 : 1) · (a·q + f·α·q²·(2·(1 − q)·softplus(z) + q) + d·q·(1 − q)) + u·q·(1 − q)
    dlogits = Σ over the pixels around, dx weighted as above

Pixel y of H lies at ((2y + 1)·h − H) / 2H on a map of h rows, or at 0 if that is negative: integers give exactly the
rows around it and the pixels between two rows. Both passes walk over the map row by row and read two rows of logits
once for all pixels between them. Forward, a lane is a column of pixels. Backward, it is a column of logits and visits
the pixels up to the next column; the gradients of the left and right columns are stored separately and added by a
second kernel. The last lane also visits the pixels left of the first column. No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import cdiv, launch

SUMS = tl.constexpr(5)
ALPHA = tl.constexpr(0.25)

# Of one program, a warp: a thread holds all classes of a column and computes what depends on the column alone once.
TILE = {"CLASSES": 8, "COLUMNS": 32}
BLOCK = 1024  # logits of one program of `_add`
# Rows of pixels per program, if PROGRAMS remain. The backward takes more: it also visits the row before its first one.
FORWARD_ROWS, BACKWARD_ROWS, PROGRAMS = 32, 64, 1024


@triton.jit
def _first_pixel(row, rows, pixels):
    """The first of `pixels` at or after `row`."""
    return tl.where(row == 0, 0, tl.minimum((pixels * (2 * row + 1) + rows - 1) // (2 * rows), pixels))


@triton.jit
def _next_weight(pixel, row, rows, pixels):
    """The bilinear weight of the row after `row` in a pixel between the two."""
    return tl.maximum((2 * pixel + 1) * rows - pixels - 2 * pixels * row, 0).to(tl.float32) / (2 * pixels)


@triton.jit
def _load_labels(labels, offset, classes):
    """As int32; −1 if it is no class."""
    label = tl.load(labels + offset).to(tl.int64)
    return tl.where((label >= 0) & (label < classes), label, -1).to(tl.int32)


@triton.jit
def _softplus(z, e):
    """log(1 + eᶻ) for any z, from e = exp(−|z|): log(1 + e) is e times a polynomial, within 3e-8. NaN for −∞, as in
    PyTorch's binary cross-entropy."""
    series = 0.005232676398009062 * e - 0.029505165293812752
    series = series * e + 0.07822582870721817
    series = series * e - 0.13663235306739807
    series = series * e + 0.19106002151966095
    series = series * e - 0.2484298050403595
    series = series * e + 0.3331909775733948
    series = series * e - 0.4999949336051941
    series = series * e + 0.9999999403953552
    return series * e + 0.5 * (z + tl.abs(z))


@triton.jit
def _sigmoids(z, exponential):
    """sigmoid(z) and sigmoid(−z), from exp(−|z|)."""
    larger = 1.0 / (1.0 + exponential)
    smaller = exponential * larger  # NaN is in both, so it reaches the results
    return tl.where(z >= 0, larger, smaller), tl.where(z >= 0, smaller, larger)


@triton.jit
def _forward(
    logits, labels, sums, classes, height, width, label_height, label_width, rows, parts,
    CLASSES: tl.constexpr, COLUMNS: tl.constexpr, BCE: tl.constexpr, FOCAL: tl.constexpr, DICE: tl.constexpr,
):  # fmt: skip
    """Sums over the pixels of COLUMNS columns between some `rows` of the map and the rows after them."""
    class_tiles = tl.cdiv(classes, CLASSES)
    t = tl.program_id(0) % class_tiles * CLASSES + tl.arange(0, CLASSES)
    part = tl.program_id(0) // class_tiles % parts
    image = (tl.program_id(0) // (class_tiles * parts)).to(tl.int64)
    column_tiles = tl.cdiv(label_width, COLUMNS)
    x = part % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    t_mask = t < classes
    x_mask = (x < label_width)[None, :]
    t = tl.minimum(t, classes - 1)  # lanes past the end repeat the last one: loads then need no mask
    x = tl.minimum(x, label_width - 1)
    begin = part // column_tiles * rows
    end = tl.minimum(begin + rows, height)

    position = tl.maximum((2 * x + 1) * width - label_width, 0)
    left = tl.minimum(position // (2 * label_width), width - 1)
    right = tl.minimum(left + 1, width - 1)
    right_weight = ((position - 2 * label_width * left).to(tl.float32) / (2 * label_width))[None, :]
    labels += image * label_height * label_width
    maps = logits + (image * classes + t[:, None]) * height * width

    bce = tl.zeros((CLASSES, COLUMNS), tl.float32)
    focal = tl.zeros((CLASSES, COLUMNS), tl.float32)
    difference = tl.zeros((CLASSES, COLUMNS), tl.float32)
    probability = tl.zeros((CLASSES, COLUMNS), tl.float32)
    count = tl.zeros((CLASSES, COLUMNS), tl.float32)
    for row in range(begin, end):
        above = row * width
        below = tl.minimum(row + 1, height - 1) * width
        above_left = tl.load(maps + (above + left)[None, :]).to(tl.float32)
        above_right = tl.load(maps + (above + right)[None, :]).to(tl.float32)
        below_left = tl.load(maps + (below + left)[None, :]).to(tl.float32)
        below_right = tl.load(maps + (below + right)[None, :]).to(tl.float32)
        upper = above_left * (1.0 - right_weight) + above_right * right_weight
        lower = below_left * (1.0 - right_weight) + below_right * right_weight
        for y in range(_first_pixel(row, height, label_height), _first_pixel(row + 1, height, label_height)):
            lower_weight = _next_weight(y, row, height, label_height)
            value = upper * (1.0 - lower_weight) + lower * lower_weight
            label = _load_labels(labels, y * label_width + x, classes)
            positive = label[None, :] == t[:, None]
            z = tl.where(positive, -value, value)
            exponential = tl.exp(-tl.abs(z))
            if BCE or FOCAL:
                softplus = _softplus(z, exponential)
                if BCE:
                    bce += softplus
            if FOCAL or DICE:
                q, complement = _sigmoids(z, exponential)
                if FOCAL:
                    focal += tl.where(positive, ALPHA, 1 - ALPHA) * q * q * softplus
                if DICE:
                    difference += q
                    probability += tl.where(positive, complement, q)
                count += tl.where(positive, 1.0, 0.0)

    sums += ((image * parts + part) * classes + t) * SUMS
    tl.store(sums, tl.sum(tl.where(x_mask, bce, 0.0), 1), mask=t_mask)
    tl.store(sums + 1, tl.sum(tl.where(x_mask, focal, 0.0), 1), mask=t_mask)
    tl.store(sums + 2, tl.sum(tl.where(x_mask, difference, 0.0), 1), mask=t_mask)
    tl.store(sums + 3, tl.sum(tl.where(x_mask, probability, 0.0), 1), mask=t_mask)
    tl.store(sums + 4, tl.sum(tl.where(x_mask, count, 0.0), 1), mask=t_mask)


@triton.jit
def _backward(
    grad, logits, labels, left_grad, right_grad, classes, height, width, label_height, label_width, rows, parts,
    CLASSES: tl.constexpr, COLUMNS: tl.constexpr, BCE: tl.constexpr, FOCAL: tl.constexpr, DICE: tl.constexpr,
):  # fmt: skip
    """Gradients of COLUMNS columns of the map and of those after them, from the pixels between, for some `rows`."""
    class_tiles = tl.cdiv(classes, CLASSES)
    t = tl.program_id(0) % class_tiles * CLASSES + tl.arange(0, CLASSES)
    part = tl.program_id(0) // class_tiles % parts
    image = (tl.program_id(0) // (class_tiles * parts)).to(tl.int64)
    column_tiles = tl.cdiv(width, COLUMNS)
    # From right to left: the compiler then assigns a thread all classes of one column, not one class of several.
    left = part % column_tiles * COLUMNS + COLUMNS - 1 - tl.arange(0, COLUMNS)
    mask = (t < classes)[:, None] & (left < width)[None, :]
    t = tl.minimum(t, classes - 1)  # lanes past the end repeat the last one: loads then need no mask
    left = tl.minimum(left, width - 1)
    begin = part // column_tiles * rows
    end = tl.minimum(begin + rows, height)

    # The column after the last one is the first: the pixels left of it follow those right of the last one.
    last = left == width - 1
    right = tl.where(last, 0, left + 1)
    start = _first_pixel(left, width, label_width)
    margin = tl.minimum((label_width + width - 1) // (2 * width), label_width)  # pixels left of the first column
    start = tl.where(left == 0, margin, start)
    pixels = tl.where(last, label_width + margin, _first_pixel(left + 1, width, label_width)) - start
    most_pixels = tl.max(pixels, 0)
    labels += image * label_height * label_width
    maps = logits + (image * classes + t[:, None]) * height * width
    offset = (image * classes + t[:, None]) * height * width + left[None, :]

    grad += (image * classes + t) * SUMS
    bce_grad = tl.load(grad)[:, None]
    focal_grad = tl.load(grad + 1)[:, None]
    difference_grad = tl.load(grad + 2)[:, None]
    probability_grad = tl.load(grad + 3)[:, None]

    # The row before the first one is visited for its part in the gradient of the first one only.
    next_left_acc = tl.zeros((CLASSES, COLUMNS), tl.float32)
    next_right_acc = tl.zeros((CLASSES, COLUMNS), tl.float32)
    for row in range(tl.maximum(begin - 1, 0), end):
        above = row * width
        below = tl.minimum(row + 1, height - 1) * width
        above_left = tl.load(maps + (above + left)[None, :]).to(tl.float32)
        above_right = tl.load(maps + (above + right)[None, :]).to(tl.float32)
        below_left = tl.load(maps + (below + left)[None, :]).to(tl.float32)
        below_right = tl.load(maps + (below + right)[None, :]).to(tl.float32)
        left_acc, right_acc = next_left_acc, next_right_acc
        next_left_acc = tl.zeros((CLASSES, COLUMNS), tl.float32)
        next_right_acc = tl.zeros((CLASSES, COLUMNS), tl.float32)
        for step in range(most_pixels):
            x = start + step
            x_mask = step < pixels
            wrapped = x >= label_width
            x = tl.minimum(tl.where(wrapped, x - label_width, x), label_width - 1)
            weight = _next_weight(x, left, width, label_width)
            uses_left = (x_mask & ~wrapped)[None, :]
            uses_right = (x_mask & (wrapped | ~last))[None, :]
            right_weight = tl.where(last, 1.0, weight)[None, :]
            left_weight = tl.where(last, 1.0, 1.0 - weight)[None, :]
            upper = tl.where(uses_left, above_left * left_weight, 0.0)
            upper += tl.where(uses_right, above_right * right_weight, 0.0)
            lower = tl.where(uses_left, below_left * left_weight, 0.0)
            lower += tl.where(uses_right, below_right * right_weight, 0.0)
            upper_acc = tl.zeros((CLASSES, COLUMNS), tl.float32)
            lower_acc = tl.zeros((CLASSES, COLUMNS), tl.float32)
            for y in range(_first_pixel(row, height, label_height), _first_pixel(row + 1, height, label_height)):
                lower_weight = _next_weight(y, row, height, label_height)
                value = upper * (1.0 - lower_weight) + lower * lower_weight
                label = _load_labels(labels, y * label_width + x, classes)
                positive = label[None, :] == t[:, None]
                z = tl.where(positive, -value, value)
                exponential = tl.exp(-tl.abs(z))
                q, complement = _sigmoids(z, exponential)
                slope = tl.zeros((CLASSES, COLUMNS), tl.float32)
                if BCE:
                    slope += bce_grad * q
                if FOCAL:
                    inner = 2.0 * complement * _softplus(z, exponential) + q
                    slope += focal_grad * tl.where(positive, ALPHA, 1 - ALPHA) * q * q * inner
                if DICE:
                    slope += difference_grad * q * complement
                slope = tl.where(positive, -slope, slope)
                if DICE:
                    slope += probability_grad * q * complement
                lower_weight = tl.where(row == height - 1, 0.0, lower_weight)  # no row below: this one gets all
                upper_acc += slope * (1.0 - lower_weight)
                lower_acc += slope * lower_weight
            left_acc += tl.where(uses_left, upper_acc * left_weight, 0.0)
            right_acc += tl.where(uses_right, upper_acc * right_weight, 0.0)
            next_left_acc += tl.where(uses_left, lower_acc * left_weight, 0.0)
            next_right_acc += tl.where(uses_right, lower_acc * right_weight, 0.0)
        tl.store(left_grad + offset + above, left_acc, mask=mask & (row >= begin))
        tl.store(right_grad + offset + above, right_acc, mask=mask & (row >= begin))


@triton.jit
def _add(left_grad, right_grad, out, size, width, BLOCK: tl.constexpr):
    """A column's gradient from the pixels on both sides of it: the column before the first one is the last."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    before = tl.where(i % width == 0, i + width - 1, i - 1)
    left = tl.load(left_grad + i, mask=i < size, other=0.0)
    tl.store(out + i, left + tl.load(right_grad + before, mask=i < size, other=0.0), mask=i < size)


def _split(logits: Tensor, labels: Tensor, pixel_rows: int, columns: int) -> tuple[int, int, int]:
    """Rows of the map per program, from rows of pixels; in how many parts that splits a map; how many programs."""
    height, column_tiles = logits.shape[2], cdiv(columns, TILE["COLUMNS"])
    map_tiles = len(logits) * cdiv(logits.shape[1], TILE["CLASSES"])
    rows = max(1, pixel_rows * height // labels.shape[1])
    while rows > 1 and map_tiles * column_tiles * cdiv(height, rows) < PROGRAMS:
        rows //= 2
    parts = cdiv(height, rows) * column_tiles
    return rows, parts, map_tiles * parts


def mask_sums(logits: Tensor, labels: Tensor, bce: bool, focal: bool, dice: bool) -> Tensor:
    """(B, T, h, w) logits and (B, H, W) labels -> (B, T, SUMS) float32; zeros for terms that are not asked for."""
    rows, parts, programs = _split(logits, labels, FORWARD_ROWS, labels.shape[2])
    sums = logits.new_empty(len(logits), parts, logits.shape[1], SUMS.value, dtype=torch.float32)
    launch(
        _forward, (programs,), logits, labels, sums, *logits.shape[1:], *labels.shape[1:], rows, parts,
        **TILE, BCE=bce, FOCAL=focal, DICE=dice, warps=1,
    )  # fmt: skip
    return sums.sum(1)


def mask_sums_backward(
    grad: Tensor, logits: Tensor, labels: Tensor, bce: bool, focal: bool, dice: bool, needs: list[bool]
) -> list[Tensor | None]:
    """Gradient of the logits, from that of the sums."""
    width = logits.shape[3]
    rows, parts, programs = _split(logits, labels, BACKWARD_ROWS, width)
    left_grad, right_grad = (logits.new_empty(logits.shape, dtype=torch.float32) for _ in range(2))
    out = torch.empty_like(logits)
    launch(
        _backward, (programs,),
        grad, logits, labels, left_grad, right_grad, *logits.shape[1:], *labels.shape[1:], rows, parts,
        **TILE, BCE=bce, FOCAL=focal, DICE=dice, warps=1,
    )  # fmt: skip
    launch(_add, (cdiv(out.numel(), BLOCK),), left_grad, right_grad, out, out.numel(), width, BLOCK=BLOCK)
    return [out, None]
