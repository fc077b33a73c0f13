"""Mask losses: sums over the pixels of each image, for each class, of logits resized to the size of a label map.

    x = Σ of the four logits around a pixel, weighted bilinearly (corners not aligned),   p = sigmoid(x)
    y = [label = t],   z = y ? −x : x,   q = sigmoid(z) = |p − y|,   α = y ? ¼ : ¾
    sums = Σ softplus(z),   Σ α·q²·softplus(z),   Σ q,   Σ p,   Σ y

Backward, from the gradients a, f, d, u of the first four sums:

    dx = (y ? −1 : 1) · (a·q + f·α·q²·(2·(1 − q)·softplus(z) + q) + d·q·(1 − q)) + u·q·(1 − q)
    dlogits = Σ over the pixels around, dx weighted as above

Pixel y of H lies at ((2y + 1)·h − H) / 2H on a map of h rows, and at 0 where that is negative: whole numbers tell
exactly between which rows, and which pixels lie between two given ones. Both passes walk over the map row by row: the
two rows of logits around are read once for all pixels between them. Forward, a lane is a column of pixels. Backward, it
is a column of logits and looks at the pixels up to the next one, so that each is worked out once; what they give to
their left and right column is kept apart and joined by a second kernel. Pixels left of the first column are as many as
pixels right of the last, up to one: the last lane takes both. No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import cdiv, launch

SUMS = tl.constexpr(5)
ALPHA = tl.constexpr(0.25)

# Classes and columns of one program, for any element size: all is worked out in float32. A program has a single warp: a
# thread then holds all classes of a column, and what depends on the column alone is worked out once for them.
TILE = {"CLASSES": 8, "COLUMNS": 32}
JOINED = 1024  # logits of one program of the second backward kernel
# Rows of pixels that a program works on, where that leaves at least so many programs. The backward pass takes more: it
# looks at the rows before its first one too.
FORWARD_ROWS, BACKWARD_ROWS, PROGRAMS = 32, 64, 1024


@triton.jit
def _first_pixel(row, rows, pixels):
    """The first of `pixels` that lies at or after `row`."""
    return tl.where(row == 0, 0, tl.minimum((pixels * (2 * row + 1) + rows - 1) // (2 * rows), pixels))


@triton.jit
def _share(pixel, row, rows, pixels):
    """The share of the row after `row` in a pixel between the two."""
    return tl.maximum((2 * pixel + 1) * rows - pixels - 2 * pixels * row, 0).to(tl.float32) / (2 * pixels)


@triton.jit
def _load_labels(labels, offset, classes, ignore):
    """As int32; −1 where it is no class."""
    label = tl.load(labels + offset).to(tl.int64)
    return tl.where((label != ignore) & (label >= 0) & (label < classes), label, -1).to(tl.int32)


@triton.jit
def _softplus(z, exponential):
    """log(1 + eᶻ), accurate for any size of z, from exp(−|z|): log(1 + e) is e times a polynomial within 3e-8 for
    0 ≤ e ≤ 1. NaN for −∞, as PyTorch's binary cross-entropy has it."""
    e = exponential
    total = 0.005232676398009062 * e - 0.029505165293812752
    total = total * e + 0.07822582870721817
    total = total * e - 0.13663235306739807
    total = total * e + 0.19106002151966095
    total = total * e - 0.2484298050403595
    total = total * e + 0.3331909775733948
    total = total * e - 0.4999949336051941
    total = total * e + 0.9999999403953552
    return total * e + 0.5 * (z + tl.abs(z))


@triton.jit
def _sigmoids(z, exponential):
    """Of z and of −z, from exp(−|z|)."""
    larger = 1.0 / (1.0 + exponential)
    smaller = exponential * larger
    # Written so that NaN, which is in both, is in the result.
    return tl.where(z >= 0, larger, smaller), tl.where(z >= 0, smaller, larger)


@triton.jit
def _forward(
    logits, labels, sums, classes, height, width, label_height, label_width, rows, parts, ignore,
    CLASSES: tl.constexpr, COLUMNS: tl.constexpr, BCE: tl.constexpr, FOCAL: tl.constexpr, DICE: tl.constexpr,
):  # fmt: skip
    """Sums over the pixels of `COLUMNS` columns that lie between some `rows` of the map and those after them."""
    class_tiles = tl.cdiv(classes, CLASSES)
    t = tl.program_id(0) % class_tiles * CLASSES + tl.arange(0, CLASSES)
    part = tl.program_id(0) // class_tiles % parts
    image = (tl.program_id(0) // (class_tiles * parts)).to(tl.int64)
    column_tiles = tl.cdiv(label_width, COLUMNS)
    x = part % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    exists = t < classes
    counts = (x < label_width)[None, :]
    t = tl.minimum(t, classes - 1)  # lanes beyond the end repeat the last one: loads then need no mask
    x = tl.minimum(x, label_width - 1)
    begin = part // column_tiles * rows
    end = tl.minimum(begin + rows, height)

    position = tl.maximum((2 * x + 1) * width - label_width, 0)
    left = tl.minimum(position // (2 * label_width), width - 1)
    right = tl.minimum(left + 1, width - 1)
    share = ((position - 2 * label_width * left).to(tl.float32) / (2 * label_width))[None, :]
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
        upper = above_left * (1.0 - share) + above_right * share
        lower = below_left * (1.0 - share) + below_right * share
        for y in range(_first_pixel(row, height, label_height), _first_pixel(row + 1, height, label_height)):
            down = _share(y, row, height, label_height)
            value = upper * (1.0 - down) + lower * down
            label = _load_labels(labels, y * label_width + x, classes, ignore)
            own = label[None, :] == t[:, None]
            z = tl.where(own, -value, value)
            exponential = tl.exp(-tl.abs(z))
            if BCE or FOCAL:
                softplus = _softplus(z, exponential)
                if BCE:
                    bce += softplus
            if FOCAL or DICE:
                q, rest = _sigmoids(z, exponential)
                if FOCAL:
                    focal += tl.where(own, ALPHA, 1 - ALPHA) * q * q * softplus
                if DICE:
                    difference += q
                    probability += tl.where(own, rest, q)
                count += tl.where(own, 1.0, 0.0)

    sums += ((image * parts + part) * classes + t) * SUMS
    tl.store(sums, tl.sum(tl.where(counts, bce, 0.0), 1), mask=exists)
    tl.store(sums + 1, tl.sum(tl.where(counts, focal, 0.0), 1), mask=exists)
    tl.store(sums + 2, tl.sum(tl.where(counts, difference, 0.0), 1), mask=exists)
    tl.store(sums + 3, tl.sum(tl.where(counts, probability, 0.0), 1), mask=exists)
    tl.store(sums + 4, tl.sum(tl.where(counts, count, 0.0), 1), mask=exists)


@triton.jit
def _backward(
    grad, logits, labels, to_left, to_right, classes, height, width, label_height, label_width, rows, parts, ignore,
    CLASSES: tl.constexpr, COLUMNS: tl.constexpr, BCE: tl.constexpr, FOCAL: tl.constexpr, DICE: tl.constexpr,
):  # fmt: skip
    """What the pixels between `COLUMNS` columns of the map and those after them give to either, for some `rows`."""
    class_tiles = tl.cdiv(classes, CLASSES)
    t = tl.program_id(0) % class_tiles * CLASSES + tl.arange(0, CLASSES)
    part = tl.program_id(0) // class_tiles % parts
    image = (tl.program_id(0) // (class_tiles * parts)).to(tl.int64)
    column_tiles = tl.cdiv(width, COLUMNS)
    # From right to left: the compiler then gives a thread all classes of one column, not one class of several.
    left = part % column_tiles * COLUMNS + COLUMNS - 1 - tl.arange(0, COLUMNS)
    mask = (t < classes)[:, None] & (left < width)[None, :]
    t = tl.minimum(t, classes - 1)  # lanes beyond the end repeat the last one: loads then need no mask
    left = tl.minimum(left, width - 1)
    begin = part // column_tiles * rows
    end = tl.minimum(begin + rows, height)

    # The column after the last one is the first: its pixels left of it follow those right of the last one.
    last = left == width - 1
    right = tl.where(last, 0, left + 1)
    start = _first_pixel(left, width, label_width)
    before = tl.minimum((label_width + width - 1) // (2 * width), label_width)  # how many lie left of the first column
    start = tl.where(left == 0, before, start)
    pixels = tl.where(last, label_width + before, _first_pixel(left + 1, width, label_width)) - start
    longest = tl.max(pixels, 0)
    labels += image * label_height * label_width
    maps = logits + (image * classes + t[:, None]) * height * width
    target = (image * classes + t[:, None]) * height * width + left[None, :]

    grad += (image * classes + t) * SUMS
    by_bce = tl.load(grad)[:, None]
    by_focal = tl.load(grad + 1)[:, None]
    by_difference = tl.load(grad + 2)[:, None]
    by_probability = tl.load(grad + 3)[:, None]

    # Of the row before the first one only what it gives downwards is wanted.
    down_left = tl.zeros((CLASSES, COLUMNS), tl.float32)
    down_right = tl.zeros((CLASSES, COLUMNS), tl.float32)
    for row in range(tl.maximum(begin - 1, 0), end):
        above = row * width
        below = tl.minimum(row + 1, height - 1) * width
        above_left = tl.load(maps + (above + left)[None, :]).to(tl.float32)
        above_right = tl.load(maps + (above + right)[None, :]).to(tl.float32)
        below_left = tl.load(maps + (below + left)[None, :]).to(tl.float32)
        below_right = tl.load(maps + (below + right)[None, :]).to(tl.float32)
        left_total, right_total = down_left, down_right
        down_left = tl.zeros((CLASSES, COLUMNS), tl.float32)
        down_right = tl.zeros((CLASSES, COLUMNS), tl.float32)
        for step in range(longest):
            x = start + step
            inside = step < pixels
            wrapped = x >= label_width
            x = tl.minimum(tl.where(wrapped, x - label_width, x), label_width - 1)
            share = _share(x, left, width, label_width)
            from_left = (inside & ~wrapped)[None, :]
            from_right = (inside & (wrapped | ~last))[None, :]
            right_share = tl.where(last, 1.0, share)[None, :]
            left_share = tl.where(last, 1.0, 1.0 - share)[None, :]
            upper = tl.where(from_left, above_left * left_share, 0.0)
            upper += tl.where(from_right, above_right * right_share, 0.0)
            lower = tl.where(from_left, below_left * left_share, 0.0)
            lower += tl.where(from_right, below_right * right_share, 0.0)
            up = tl.zeros((CLASSES, COLUMNS), tl.float32)
            down = tl.zeros((CLASSES, COLUMNS), tl.float32)
            for y in range(_first_pixel(row, height, label_height), _first_pixel(row + 1, height, label_height)):
                lower_share = _share(y, row, height, label_height)
                value = upper * (1.0 - lower_share) + lower * lower_share
                label = _load_labels(labels, y * label_width + x, classes, ignore)
                own = label[None, :] == t[:, None]
                z = tl.where(own, -value, value)
                exponential = tl.exp(-tl.abs(z))
                q, rest = _sigmoids(z, exponential)
                slope = tl.zeros((CLASSES, COLUMNS), tl.float32)
                if BCE:
                    slope += by_bce * q
                if FOCAL:
                    inner = 2.0 * rest * _softplus(z, exponential) + q
                    slope += by_focal * tl.where(own, ALPHA, 1 - ALPHA) * q * q * inner
                if DICE:
                    slope += by_difference * q * rest
                slope = tl.where(own, -slope, slope)
                if DICE:
                    slope += by_probability * q * rest
                lower_share = tl.where(row == height - 1, 0.0, lower_share)  # no row below: all is given to this one
                up += slope * (1.0 - lower_share)
                down += slope * lower_share
            left_total += tl.where(from_left, up * left_share, 0.0)
            right_total += tl.where(from_right, up * right_share, 0.0)
            down_left += tl.where(from_left, down * left_share, 0.0)
            down_right += tl.where(from_right, down * right_share, 0.0)
        tl.store(to_left + target + above, left_total, mask=mask & (row >= begin))
        tl.store(to_right + target + above, right_total, mask=mask & (row >= begin))


@triton.jit
def _join(to_left, to_right, out, total, width, BLOCK: tl.constexpr):
    """What either side gave to a column: the column before the first one is the last."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    before = tl.where(at % width == 0, at + width - 1, at - 1)
    result = tl.load(to_left + at, mask=at < total, other=0.0) + tl.load(to_right + before, mask=at < total, other=0.0)
    tl.store(out + at, result, mask=at < total)


def _rows(pixels: int, height: int, label_height: int, programs: int) -> int:
    """Rows of the map for one program, from those of pixels; `programs` work on each row."""
    rows = max(1, pixels * height // label_height)
    while rows > 1 and programs * cdiv(height, rows) < PROGRAMS:
        rows //= 2
    return rows


def mask_sums(logits: Tensor, labels: Tensor, ignore: int, bce: bool, focal: bool, dice: bool) -> Tensor:
    """(B, T, h, w) logits and (B, H, W) labels -> (B, T, SUMS) float32; zeros for terms that are not asked for."""
    logits, labels = logits.contiguous(), labels.contiguous()
    batch, classes, height, width = logits.shape
    label_height, label_width = labels.shape[1:]
    tiles = cdiv(label_width, TILE["COLUMNS"])
    class_tiles = cdiv(classes, TILE["CLASSES"])
    rows = _rows(FORWARD_ROWS, height, label_height, batch * class_tiles * tiles)
    parts = cdiv(height, rows) * tiles
    sums = logits.new_empty(batch, parts, classes, SUMS.value, dtype=torch.float32)
    launch(
        _forward, (batch * class_tiles * parts,),
        logits, labels, sums, classes, height, width, label_height, label_width, rows, parts, ignore,
        **TILE, BCE=bce, FOCAL=focal, DICE=dice, warps=1,
    )  # fmt: skip
    return sums.sum(1)


def mask_sums_backward(
    grad: Tensor, logits: Tensor, labels: Tensor, ignore: int, bce: bool, focal: bool, dice: bool
) -> Tensor:
    """Gradient of the logits from that of the sums."""
    grad, logits, labels = grad.contiguous(), logits.contiguous(), labels.contiguous()
    batch, classes, height, width = logits.shape
    label_height, label_width = labels.shape[1:]
    tiles = cdiv(width, TILE["COLUMNS"])
    class_tiles = cdiv(classes, TILE["CLASSES"])
    rows = _rows(BACKWARD_ROWS, height, label_height, batch * class_tiles * tiles)
    parts = cdiv(height, rows) * tiles
    to_left, to_right = (logits.new_empty(logits.shape, dtype=torch.float32) for _ in range(2))
    out = torch.empty_like(logits)
    launch(
        _backward, (batch * class_tiles * parts,),
        grad, logits, labels, to_left, to_right, classes, height, width, label_height, label_width, rows, parts, ignore,
        **TILE, BCE=bce, FOCAL=focal, DICE=dice, warps=1,
    )  # fmt: skip
    launch(_join, (cdiv(out.numel(), JOINED),), to_left, to_right, out, out.numel(), width, BLOCK=JOINED)
    return out
