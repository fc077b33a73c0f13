"""What forward and backward of `spatial_aggregation.py` share: q, k and v of each token, and a window's tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common.launch import block, cdiv, launch, precision, sizes
from .common.math import dot, rounded

EPS = 1e-5  # torch.nn.functional.layer_norm
LOG2E = tl.constexpr(1.4426950408889634)  # scores are in units of log 2: the hardware's exponential has base two
REGION_MASK = tl.constexpr(-100.0 * 1.4426950408889634)

# Tile of a projection, channels per step and warps, by bytes of an element. Float32 products without TF32 are unrolled,
# which takes registers.
TILES = {
    2: {"ROWS": 128, "COLUMNS": 128, "CHANNELS": 64, "warps": 8},
    4: {"ROWS": 32, "COLUMNS": 32, "CHANNELS": 32, "warps": 4},
}


@triton.jit
def _statistics(x, row, inside, channels, eps, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean and 1 / √(variance + eps) of each row."""
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, channels, CHANNELS):
        i = start + tl.arange(0, CHANNELS)
        value = tl.load(x + row[:, None].to(tl.int64) * channels + i, mask=inside[:, None] & (i < channels), other=0.0)
        total += tl.sum(value.to(tl.float32), 1)
    mean = total / channels
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, channels, CHANNELS):
        i = start + tl.arange(0, CHANNELS)
        value = tl.load(x + row[:, None].to(tl.int64) * channels + i, mask=inside[:, None] & (i < channels), other=0.0)
        centred = tl.where(i < channels, value.to(tl.float32) - mean[:, None], 0.0)
        squares += tl.sum(centred * centred, 1)
    return mean, 1.0 / tl.sqrt(squares / channels + eps)


@triton.jit
def _project(
    x, q_term, k_term, norm_weight, norm_bias, weight, v_bias, tokens, rows, classes, positions, channels, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of q, k or v (`part` 0, 1 or 2); tokens (rows, 3 · channels)."""
    tiles = tl.cdiv(channels, COLUMNS)
    row = tl.program_id(0) // (3 * tiles) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(0) // tiles % 3
    c = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    row_mask = row < rows
    mean, scale = _statistics(x, row, row_mask, channels, eps, ROWS, CHANNELS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, channels, CHANNELS):
        i = start + tl.arange(0, CHANNELS)
        mask = row_mask[:, None] & (i < channels)
        value = tl.load(x + row[:, None].to(tl.int64) * channels + i, mask=mask, other=0.0)
        norm_w = tl.load(norm_weight + i, mask=i < channels, other=0.0).to(tl.float32)
        norm_b = tl.load(norm_bias + i, mask=i < channels, other=0.0).to(tl.float32)
        normed = (value.to(tl.float32) - mean[:, None]) * scale[:, None] * norm_w + norm_b
        mask = (c < channels)[:, None] & (i < channels)
        w = tl.load(weight + (part * channels + c)[:, None] * channels + i, mask=mask, other=0.0)
        acc = dot(rounded(normed, x.dtype.element_ty), tl.trans(w), acc, PRECISION)
    mask = row_mask[:, None] & (c < channels)
    if part == 2:
        acc += tl.load(v_bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    else:
        # All classes of an image share the guidance's terms.
        term_offset = (row // (classes * positions) * positions + row % positions)[:, None].to(tl.int64) * channels + c
        if part == 0:
            acc += tl.load(q_term + term_offset, mask=mask, other=0.0).to(tl.float32)
        else:
            acc += tl.load(k_term + term_offset, mask=mask, other=0.0).to(tl.float32)
    offset = row[:, None].to(tl.int64) * (3 * channels) + part * channels + c
    tl.store(tokens + offset, rounded(acc, tokens.dtype.element_ty), mask=mask)


@triton.jit
def slots(start, window, height, width, WINDOW: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr):
    """`COUNT` slots of a window from `start` on: positions on the map, and regions, −1 beyond the map. A shift joins
    the map's end and its beginning, which are different regions, in the last windows of an axis."""
    rows, columns = tl.cdiv(height, WINDOW), tl.cdiv(width, WINDOW)
    slot = start + tl.arange(0, COUNT)
    y = window // columns * WINDOW + slot // WINDOW
    x = window % columns * WINDOW + slot % WINDOW
    region = (y >= rows * WINDOW - SHIFT).to(tl.int32) * 2 + (x >= columns * WINDOW - SHIFT).to(tl.int32)
    y = (y + SHIFT) % (rows * WINDOW)
    x = (x + SHIFT) % (columns * WINDOW)
    return y * width + x, tl.where((slot < WINDOW * WINDOW) & (y < height) & (x < width), region, -1)


@triton.jit
def masked(scores, keys, queries, SHIFT: tl.constexpr, FULL: tl.constexpr):
    """Scores, masked by the regions of keys and queries, along either axis. `FULL`: every slot holds a token."""
    if SHIFT > 0:
        scores += tl.where(keys == queries, 0.0, REGION_MASK)
    if not FULL:
        scores = tl.where(keys >= 0, scores, float("-inf"))
    return scores


def window_tiles(height: int, width: int, window: int, shift: int) -> dict[str, int | bool]:
    """Constants of a kernel over windows: the two tiles that hold a window's tokens, and whether they are full."""
    tokens = window**2
    main = 1 << min(max(tokens.bit_length() - 1, 4), 7)
    tail = block(tokens - main) if tokens > main else 0
    full = height % window == 0 and width % window == 0 and main + tail == tokens
    return {"WINDOW": window, "SHIFT": shift, "MAIN": main, "TAIL": tail, "FULL": full}


def project(x: Tensor, q_term: Tensor, k_term: Tensor, *weights: Tensor) -> Tensor:
    """q, k and v of each token: (B · T · H · W, 3 C), by the weights of the norm, of all three and v's bias."""
    batch, classes, height, width, channels = x.shape
    rows = batch * classes * height * width
    tokens = x.new_empty(rows, 3 * channels)
    tile = projection_tile(x)
    launch(
        _project, (cdiv(rows, tile["ROWS"]) * 3 * cdiv(channels, tile["COLUMNS"]),),
        x, q_term, k_term, *weights, tokens, rows, classes, height * width, channels, EPS,
        **tile, PRECISION=precision(),
    )  # fmt: skip
    return tokens


def projection_tile(x: Tensor) -> dict[str, int]:
    """Tile sizes of a projection, no wider than the channels, and the warps of a program."""
    tile = sizes(TILES, x)
    return tile | {name: block(x.shape[-1], most=tile[name]) for name in ("COLUMNS", "CHANNELS")}
