"""Cost embedding: a convolution over every class's cost map, which is never stored.

    out[b, t, y, x, c] = bias[c] + Σ_pij weight[c, p, i, j] · cost[b, t, p, y + i − r, x + j − r],    r = K // 2

with `cost` as in `cost_volume.py`, and 0 outside the map. Its backward is in `_cost_embedding_backward.py`.

A program takes a rectangular tile of the map and 16 text embeddings: with one prompt a class those of 16 classes, else
16 prompts of one class at a time. One product gives the costs of the tile and its halo; they stay on chip as one row of
numbers, from which `tl.gather` builds the windows (pixels × K²), and a second product with the weight embeds them.

At the published size (576 patches of 512 channels, 171 classes, 128 outputs, 16 bits) the output's 25 MB are the floor,
6 µs on an H200; arithmetic is small (0.1 GFLOP for the costs, 1.2 for the convolution). What a fused kernel can lose is
the image embeddings, read from the second-level cache again by every program: 100 MB for one class and the whole map at
a time, 25 MB for 16 classes and tiles of 4 × 6 pixels, 120 with their halo. Tiles of 6 × 8 would read 17 MB, but leave
one program to a processor, which could not write one tile's outputs while another one's halo is read.

Padding never meets a weight that is infinite or NaN, as 0 · inf would spread it: the products take the weight's finite
part, and a path of its own, which other weights never enter, adds the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common.launch import block, cdiv, launch, precision, sizes
from .common.map_tiles import halo_pixels, map_tile, tile_pixels
from .common.math import dot
from .cost_embedding_backward import cost_gradient, weight_gradient
from .cost_volume import cost_volume, cost_volume_backward, products

# The last four for the backward in `ovseg_fast/ops/cost_embedding.py`.
__all__ = ["cost_embedding", "cost_gradient", "cost_volume", "cost_volume_backward", "weight_gradient"]

HALO = 128  # pixels of a tile and its halo
COLUMNS = 16  # text embeddings at a time, the least that a tensor core takes

# Pixels (of one class or several) and outputs that are embedded at a time, channels of the embeddings read at a time,
# and elements of the window at a time. By bytes of an element. Pixels make up for outputs that are fewer.
TILES = {
    2: {"ITEMS": 64, "OUTPUTS": 128, "CHANNELS": 64, "TAPS": 128},
    4: {"ITEMS": 32, "OUTPUTS": 32, "CHANNELS": 32, "TAPS": 32},
}
OPTIONS = {2: {"warps": 8, "stages": 4}, 4: {"warps": 4, "stages": 2}}


@triton.jit
def _halo_costs(
    image, text, pixel, inside, row, present, channels,
    HALO: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Costs between pixels, (HALO,), and rows of `text`, (COLUMNS,): one row after another, (COLUMNS · HALO,)."""
    acc, image_norm, text_norm = products(
        image, pixel, inside, text, row, present, channels, HALO, COLUMNS, CHANNELS, PRECISION
    )
    costs = acc / text_norm[None, :] / image_norm[:, None]
    costs = tl.where(inside[:, None], costs, 0.0)  # also where the text is NaN
    return tl.reshape(tl.trans(costs), (COLUMNS * HALO,))


@triton.jit
def _weights(weight, prompt, first, c, prompts, outputs, SIZE: tl.constexpr, TAPS: tl.constexpr):
    """TAPS elements of one prompt's window, from `first` on, as a matrix (TAPS, OUTPUTS); 0 beyond K². Returns its
    finite part, and 1 where that is all of it, else 0."""
    tap = first + tl.arange(0, TAPS)
    place = (c * prompts + prompt)[None, :] * (SIZE * SIZE) + tap[:, None]
    matrix = tl.load(weight + place, mask=(tap < SIZE * SIZE)[:, None] & (c < outputs)[None, :], other=0.0)
    finite = tl.abs(matrix.to(tl.float32)) < float("inf")
    return tl.where(finite, matrix.to(tl.float32), 0.0).to(matrix.dtype), tl.min(tl.min(finite.to(tl.int32), 1), 0)


@triton.jit
def _add_windows(
    total, costs, corner, first, matrix, halo_width,
    SIZE: tl.constexpr, TAPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total (ITEMS, OUTPUTS) + TAPS elements, from `first` on, of the windows whose first ones lie at `corner` in
    `costs`, times `matrix`."""
    tap = first + tl.arange(0, TAPS)
    real = tap < SIZE * SIZE
    index = corner[:, None] + tl.where(real, tap // SIZE * halo_width + tap % SIZE, 0)[None, :]
    windows = tl.gather(costs, tl.reshape(index, (index.shape[0] * TAPS,)), 0)
    windows = tl.where(real[None, :], tl.reshape(windows, index.shape), 0.0)
    return dot(windows.to(matrix.dtype), matrix, total, PRECISION)


@triton.jit
def _add_not_finite(
    out, costs, image, text, weight, source, inside, top, left, first, present,
    prompts, height, width, channels, outputs, tile_height, tile_width,
    SIZE: tl.constexpr, HALO: tl.constexpr, COLUMNS: tl.constexpr, PIXELS: tl.constexpr, OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to the stored `out` of a tile what `_weights` left out, which makes it infinite or NaN.

    One element of the window after another, and only where it lies within the map: 0 · inf would make padding NaN.
    `costs` are the classes' with one prompt each, else None.
    """
    _which, y, x, real, corner = tile_pixels(
        top, left, height, width, tile_height, tile_width, SIZE, HALO, PIXELS, 1
    )  # fmt: skip
    halo_width = tile_width + SIZE - 1
    column = tl.arange(0, COLUMNS)
    for number in range(present * prompts):
        if costs is None:
            row = first * prompts + number + column
            own_costs = _halo_costs(
                image, text, source, inside, row, column == 0, channels, HALO, COLUMNS, CHANNELS, PRECISION
            )
            own = corner
        else:
            own_costs = costs
            own = corner + number * HALO
        token = (number // prompts * height + y).to(tl.int64) * width + x
        for start in range(0, outputs, OUTPUTS):
            c = start + tl.arange(0, OUTPUTS)
            for tap in range(SIZE * SIZE):
                place = (c * prompts + number % prompts) * (SIZE * SIZE) + tap
                value = tl.load(weight + place, mask=c < outputs, other=0.0).to(tl.float32)
                rest = (tl.abs(value) < float("inf")) == 0
                if tl.max(rest.to(tl.int32), 0) == 1:
                    i = y + tap // SIZE - SIZE // 2
                    j = x + tap % SIZE - SIZE // 2
                    inside_map = real & (i >= 0) & (i < height) & (j >= 0) & (j < width)
                    mask = inside_map[:, None] & rest[None, :]
                    cost = tl.gather(own_costs, own + tap // SIZE * halo_width + tap % SIZE, 0)
                    target = out + token[:, None] * outputs + c[None, :]
                    before = tl.load(target, mask=mask, other=0.0).to(tl.float32)
                    tl.store(target, before + cost[:, None] * value[None, :], mask=mask)


@triton.jit
def _forward(
    image, text, weight, bias, out,
    classes, prompts, height, width, channels, outputs, tile_height, tile_width,
    SIZE: tl.constexpr, TAPS: tl.constexpr, HALO: tl.constexpr, COLUMNS: tl.constexpr, ITEMS: tl.constexpr,
    PIXELS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr,
    ONE_PROMPT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    together: tl.constexpr = COLUMNS if ONE_PROMPT else 1  # classes of a program
    at_once: tl.constexpr = ITEMS // PIXELS if ONE_PROMPT else 1  # of these so many are embedded at a time
    one_matrix: tl.constexpr = ONE_PROMPT and SIZE * SIZE <= TAPS  # which then stays on chip
    tiles = tl.cdiv(height, tile_height) * tl.cdiv(width, tile_width)
    groups = tl.cdiv(classes, together)
    batch = (tl.program_id(0) // (tiles * groups)).to(tl.int64)
    first = tl.program_id(0) // tiles % groups * together
    present = tl.minimum(together, classes - first)
    top, left, halo_y, halo_x, inside = halo_pixels(
        tl.program_id(0) % tiles, height, width, tile_height, tile_width, SIZE, HALO, 1
    )  # fmt: skip
    halo_width = tile_width + SIZE - 1
    image += batch * height * width * channels
    out += (batch * classes + first) * height * width * outputs
    source = halo_y * width + halo_x
    column = tl.arange(0, COLUMNS)
    if ONE_PROMPT:
        costs = _halo_costs(
            image, text, source, inside, first + column, column < present, channels,
            HALO, COLUMNS, CHANNELS, PRECISION,
        )  # fmt: skip
    which, y, x, real, corner = tile_pixels(
        top, left, height, width, tile_height, tile_width, SIZE, HALO, PIXELS, at_once
    )  # fmt: skip
    finite = 1
    for number in range(BLOCKS):  # a constant, as one block needs no loop
        c = number * OUTPUTS + tl.arange(0, OUTPUTS)
        shift = tl.load(bias + c, mask=c < outputs, other=0.0).to(tl.float32)
        if one_matrix:
            matrix, finite_part = _weights(weight, 0, 0, c, prompts, outputs, SIZE, TAPS)
            finite = tl.minimum(finite, finite_part)
        for k in range(0, present, at_once):
            total = tl.zeros((at_once * PIXELS, OUTPUTS), tl.float32)
            for prompt in range(0, prompts, COLUMNS):
                if not ONE_PROMPT:
                    row = first * prompts + prompt + column
                    costs = _halo_costs(
                        image, text, source, inside, row, prompt + column < prompts, channels,
                        HALO, COLUMNS, CHANNELS, PRECISION,
                    )  # fmt: skip
                for own in range(tl.minimum(COLUMNS, prompts - prompt)):
                    for tap in range(0, SIZE * SIZE, TAPS):
                        if not one_matrix:
                            matrix, finite_part = _weights(
                                weight, prompt + own, tap, c, prompts, outputs, SIZE, TAPS
                            )  # fmt: skip
                            finite = tl.minimum(finite, finite_part)
                        total = _add_windows(
                            total, costs, corner + (k + own) * HALO, tap, matrix, halo_width, SIZE, TAPS, PRECISION
                        )
            token = (k + which).to(tl.int64) * height * width + y * width + x
            tl.store(
                out + token[:, None] * outputs + c[None, :], total + shift[None, :],
                mask=(real & (k + which < present))[:, None] & (c < outputs)[None, :],
            )  # fmt: skip
    if finite == 0:
        tl.debug_barrier()  # what one thread has stored another one reads
        _add_not_finite(
            out, costs if ONE_PROMPT else None, image, text, weight, source, inside, top, left, first, present,
            prompts, height, width, channels, outputs, tile_height, tile_width,
            SIZE, HALO, COLUMNS, PIXELS, 16, CHANNELS, PRECISION,
        )  # fmt: skip


def cost_embedding(image: Tensor, text: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, H, W, E), (T, P, E), (C, P, K, K), (C,) -> (B, T, H, W, C)."""
    batch, height, width, channels = image.shape
    classes, prompts, _ = text.shape
    outputs, size = weight.shape[0], weight.shape[-1]
    out = image.new_empty(batch, classes, height, width, outputs)
    tile = sizes(TILES, image)
    rows, columns = map_tile(height, width, size, HALO, tile["ITEMS"])
    pixels = block(rows * columns, most=tile["ITEMS"])
    together = block(outputs, most=tile["OUTPUTS"])
    items = min(128, tile["ITEMS"] * tile["OUTPUTS"] // together)
    launch(
        _forward,
        (batch * cdiv(classes, COLUMNS if prompts == 1 else 1) * cdiv(height, rows) * cdiv(width, columns),),
        image, text, weight, bias, out, classes, prompts, height, width, channels, outputs,
        rows, columns,
        SIZE=size, TAPS=block(size * size, most=tile["TAPS"]), HALO=HALO, COLUMNS=COLUMNS, ITEMS=items,
        PIXELS=pixels, OUTPUTS=together, BLOCKS=cdiv(outputs, together), CHANNELS=tile["CHANNELS"],
        ONE_PROMPT=prompts == 1, PRECISION=precision(), **sizes(OPTIONS, image),
    )  # fmt: skip
    return out
