"""The end of class aggregation after pooling: x + y resized to the size of x, bilinear with aligned corners.

    out[i, j] = x[i, j] + Σ_{a,b} hat(i · s_h − a) · hat(j · s_w − b) · y[a, b],   hat(d) = max(1 − |d|, 0)

with s_h = (h − 1) / (H − 1), s_w likewise, so that at most two rows and two columns of y count. Backward sums over the
rows and columns of the result that a token of y reaches:

    dy[a, b] = Σ_{i,j} hat(i · s_h − a) · hat(j · s_w − b) · dout[i, j]
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .class_aggregation_tokens import row_tile
from .common.launch import cdiv, launch
from .common.math import rounded


@triton.jit
def _taps(place, scale, size):
    """The two neighbours in the smaller line, of `size`, and the weight of the second."""
    exact = place.to(tl.float32) * scale
    low = tl.minimum(exact.to(tl.int32), size - 1)
    high = tl.where(low < size - 1, low + 1, low)
    return low, high, exact - low.to(tl.float32)


@triton.jit
def _resize_add(
    x, y, out, rows, height, width, low_height, low_width, channels, scale_h, scale_w,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)[None, :]
    mask = (row < rows)[:, None] & (c < channels)
    top, bottom, weight_y = _taps((row // width % height).to(tl.int32), scale_h, low_height)
    left, right, weight_x = _taps((row % width).to(tl.int32), scale_w, low_width)
    map_row = row // (height * width) * (low_height * low_width)
    weight_y, weight_x = weight_y[:, None], weight_x[:, None]
    upper, lower = map_row + top * low_width, map_row + bottom * low_width
    y += c
    a = tl.load(y + (upper + left)[:, None] * channels, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(y + (upper + right)[:, None] * channels, mask=mask, other=0.0).to(tl.float32)
    acc = (1.0 - weight_y) * ((1.0 - weight_x) * a + weight_x * b)
    a = tl.load(y + (lower + left)[:, None] * channels, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(y + (lower + right)[:, None] * channels, mask=mask, other=0.0).to(tl.float32)
    acc += weight_y * ((1.0 - weight_x) * a + weight_x * b)
    offset = row[:, None] * channels + c
    acc += tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offset, rounded(acc, out.dtype.element_ty), mask=mask)


@triton.jit
def _reach(place, size, low_size):
    """The first place in a line of `size` that `place` in the smaller one reaches."""
    return tl.maximum((place - 1) * (size - 1) // tl.maximum(low_size - 1, 1), 0)


@triton.jit
def _resize_backward(
    grad, out, rows, height, width, low_height, low_width, channels, scale_h, scale_w, lines, columns,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`lines` and `columns`: how far a token of y reaches at most."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)[None, :]
    a = (row // low_width % low_height).to(tl.int32)
    b = (row % low_width).to(tl.int32)
    map_row = row // (low_height * low_width) * (height * width)
    acc = tl.zeros((ROWS, CHANNELS), tl.float32)
    for step in range(lines * columns):
        i = _reach(a, height, low_height) + step // columns
        j = _reach(b, width, low_width) + step % columns
        weight = tl.maximum(1.0 - tl.abs(i.to(tl.float32) * scale_h - a.to(tl.float32)), 0.0)
        weight *= tl.maximum(1.0 - tl.abs(j.to(tl.float32) * scale_w - b.to(tl.float32)), 0.0)
        valid = (row < rows) & (i < height) & (j < width) & (weight > 0)
        offset = (map_row + i * width + j)[:, None] * channels + c
        g = tl.load(grad + offset, mask=valid[:, None] & (c < channels), other=0.0).to(tl.float32)
        acc += weight[:, None] * g
    acc = rounded(acc, out.dtype.element_ty)
    tl.store(out + row[:, None] * channels + c, acc, mask=(row < rows)[:, None] & (c < channels))


def _scale(low: int, high: int) -> float:
    return (low - 1) / (high - 1) if high > 1 else 0.0


def _reached(low: int, high: int) -> int:
    """How many places in a line of `high` one in a line of `low` reaches at most, from `_reach` on."""
    return min(high, 2 * (high - 1) // (low - 1) + 2) if low > 1 else high


def resize_add(x: Tensor, y: Tensor) -> Tensor:
    """(B, T, H, W, C) and (B, T, h, w, C) -> (B, T, H, W, C)."""
    *_, height, width, channels = x.shape
    low_height, low_width = y.shape[2:4]
    rows = x.numel() // channels
    out, tile = x.new_empty(x.shape), row_tile(x)
    launch(
        _resize_add, (cdiv(rows, tile["ROWS"]),),
        x, y, out, rows, height, width, low_height, low_width, channels,
        _scale(low_height, height), _scale(low_width, width), **tile,
    )  # fmt: skip
    return out


def resize_backward(grad: Tensor, low_height: int, low_width: int) -> Tensor:
    """Gradient of y; that of x is `grad` itself."""
    batch, classes, height, width, channels = grad.shape
    rows = batch * classes * low_height * low_width
    out, tile = grad.new_empty(batch, classes, low_height, low_width, channels), row_tile(grad)
    launch(
        _resize_backward, (cdiv(rows, tile["ROWS"]),),
        grad, out, rows, height, width, low_height, low_width, channels,
        _scale(low_height, height), _scale(low_width, width),
        _reached(low_height, height), _reached(low_width, width), **tile,
    )  # fmt: skip
    return out
