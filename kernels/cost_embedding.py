"""Cost embedding: a convolution over every class's cost map, which is never stored.

    out[b, t, y, x, c] = bias[c] + Σ_pij weight[c, p, i, j] · cost[b, t, p, y + i − r, x + j − r],    r = K // 2

with `cost` as in `cost_volume.py`, and 0 outside the map.

A program takes a rectangular tile of the map and 16 text embeddings: those of 16 classes if a class has one prompt,
else 16 prompts of one class at a time. One product gives the costs of the tile and its halo; they stay on chip as one
row of numbers, from which `tl.gather` builds the windows (pixels × K²); a second product embeds them with the weight.

At the published size (576 patches of 512 channels, 171 classes, 128 outputs, 16 bits) writing the output's 25 MB takes
6 µs on an H200. Every program also reads image embeddings from the L2 cache: 100 MB in all for one class and the whole
map at a time, 25 MB for 16 classes and tiles of 4 × 6 pixels. Tiles of 6 × 8 read 17 MB, but a multiprocessor then
holds one program and cannot write one tile while it reads another.

Padding never meets a weight that is infinite or NaN, as 0 · inf would spread it: the products take the finite weights,
and `_add_not_finite`, which runs only if there are others, adds the rest.
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

HALO = tl.constexpr(128)  # pixels of a tile and its halo
COLUMNS = tl.constexpr(16)  # text embeddings at a time, the least that a tensor core takes

# By bytes of an element: pixels (of one class or several) and outputs of a product, more pixels with fewer outputs;
# channels of the costs and elements of the window per step.
TILES = {
    2: {"ITEMS": 64, "OUTPUTS": 128, "CHANNELS": 64, "TAPS": 128},
    4: {"ITEMS": 32, "OUTPUTS": 32, "CHANNELS": 32, "TAPS": 32},
}
OPTIONS = {2: {"warps": 8, "stages": 4}, 4: {"warps": 4, "stages": 2}}


@triton.jit
def _halo_costs(image, text, pixel, inside, row, valid, channels, CHANNELS: tl.constexpr, PRECISION: tl.constexpr):
    """Costs between pixels, (HALO,), and rows of `text`, (COLUMNS,): one row after another, (COLUMNS · HALO,)."""
    acc, image_norm, text_norm = products(
        image, pixel, inside, text, row, valid, channels, HALO, COLUMNS, CHANNELS, PRECISION
    )
    costs = acc / text_norm[None, :] / image_norm[:, None]
    costs = tl.where(inside[:, None], costs, 0.0)  # also where the text is NaN
    return tl.reshape(tl.trans(costs), (COLUMNS * HALO,))


@triton.jit
def _weights(weight, prompt, first, c, prompts, outputs, SIZE: tl.constexpr, TAPS: tl.constexpr):
    """TAPS elements of one prompt's window as a matrix (TAPS, OUTPUTS), 0 beyond K² and if not finite; 1 if all are."""
    tap = first + tl.arange(0, TAPS)
    offset = (c * prompts + prompt)[None, :] * (SIZE * SIZE) + tap[:, None]
    matrix = tl.load(weight + offset, mask=(tap < SIZE * SIZE)[:, None] & (c < outputs)[None, :], other=0.0)
    finite = tl.abs(matrix.to(tl.float32)) < float("inf")
    return tl.where(finite, matrix.to(tl.float32), 0.0).to(matrix.dtype), tl.min(tl.min(finite.to(tl.int32), 1), 0)


@triton.jit
def _add_windows(
    acc, costs, corner, first, matrix, halo_width, SIZE: tl.constexpr, TAPS: tl.constexpr, PRECISION: tl.constexpr
):
    """acc (ITEMS, OUTPUTS) + TAPS elements of the windows that begin at `corner` in `costs`, times `matrix`."""
    tap = first + tl.arange(0, TAPS)
    valid = tap < SIZE * SIZE
    index = corner[:, None] + tl.where(valid, tap // SIZE * halo_width + tap % SIZE, 0)[None, :]
    windows = tl.gather(costs, tl.reshape(index, (index.shape[0] * TAPS,)), 0)
    windows = tl.where(valid[None, :], tl.reshape(windows, index.shape), 0.0)
    return dot(windows.to(matrix.dtype), matrix, acc, PRECISION)


@triton.jit
def _add_not_finite(
    out, costs, image, text, weight, source, inside, top, left, first, count,
    prompts, height, width, channels, outputs, tile_height, tile_width,
    SIZE: tl.constexpr, PIXELS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to the stored `out` of a tile what `_weights` left out, one element of the window after another, only within
    the map. `costs` are those of the classes with one prompt each, else None."""
    _, y, x, valid, corner = tile_pixels(top, left, height, width, tile_height, tile_width, SIZE, HALO, PIXELS, 1)
    halo_width = tile_width + SIZE - 1
    col = tl.arange(0, COLUMNS)
    for number in range(count * prompts):
        if costs is None:
            row = first * prompts + number + col
            row_costs = _halo_costs(image, text, source, inside, row, col == 0, channels, CHANNELS, PRECISION)
            index = corner
        else:
            row_costs = costs
            index = corner + number * HALO
        token = (number // prompts * height + y).to(tl.int64) * width + x
        for start in range(0, outputs, OUTPUTS):
            c = start + tl.arange(0, OUTPUTS)
            for tap in range(SIZE * SIZE):
                offset = (c * prompts + number % prompts) * (SIZE * SIZE) + tap
                value = tl.load(weight + offset, mask=c < outputs, other=0.0).to(tl.float32)
                rest = (tl.abs(value) < float("inf")) == 0
                if tl.max(rest.to(tl.int32), 0) == 1:
                    i = y + tap // SIZE - SIZE // 2
                    j = x + tap % SIZE - SIZE // 2
                    in_map = valid & (i >= 0) & (i < height) & (j >= 0) & (j < width)
                    mask = in_map[:, None] & rest[None, :]
                    cost = tl.gather(row_costs, index + tap // SIZE * halo_width + tap % SIZE, 0)
                    target = out + token[:, None] * outputs + c[None, :]
                    stored = tl.load(target, mask=mask, other=0.0).to(tl.float32)
                    tl.store(target, stored + cost[:, None] * value[None, :], mask=mask)


@triton.jit
def _forward(
    image, text, weight, bias, out, classes, prompts, height, width, channels, outputs, tile_height, tile_width,
    SIZE: tl.constexpr, TAPS: tl.constexpr, ITEMS: tl.constexpr, PIXELS: tl.constexpr, OUTPUTS: tl.constexpr,
    BLOCKS: tl.constexpr, CHANNELS: tl.constexpr, ONE_PROMPT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group: tl.constexpr = COLUMNS if ONE_PROMPT else 1  # classes of a program
    step: tl.constexpr = ITEMS // PIXELS if ONE_PROMPT else 1  # classes in one product
    one_matrix: tl.constexpr = ONE_PROMPT and SIZE * SIZE <= TAPS  # which then stays on chip
    tiles = tl.cdiv(height, tile_height) * tl.cdiv(width, tile_width)
    groups = tl.cdiv(classes, group)
    batch = (tl.program_id(0) // (tiles * groups)).to(tl.int64)
    first = tl.program_id(0) // tiles % groups * group
    count = tl.minimum(group, classes - first)
    tile = tl.program_id(0) % tiles
    top, left, halo_y, halo_x, inside = halo_pixels(tile, height, width, tile_height, tile_width, SIZE, HALO, 1)
    halo_width = tile_width + SIZE - 1
    image += batch * height * width * channels
    out += (batch * classes + first) * height * width * outputs
    source = halo_y * width + halo_x
    col = tl.arange(0, COLUMNS)
    if ONE_PROMPT:
        costs = _halo_costs(image, text, source, inside, first + col, col < count, channels, CHANNELS, PRECISION)
    which, y, x, valid, corner = tile_pixels(
        top, left, height, width, tile_height, tile_width, SIZE, HALO, PIXELS, step
    )
    finite = 1
    for output_block in range(BLOCKS):  # a constant, as one block needs no loop
        c = output_block * OUTPUTS + tl.arange(0, OUTPUTS)
        b = tl.load(bias + c, mask=c < outputs, other=0.0).to(tl.float32)
        if one_matrix:
            matrix, all_finite = _weights(weight, 0, 0, c, prompts, outputs, SIZE, TAPS)
            finite = tl.minimum(finite, all_finite)
        for k in range(0, count, step):
            acc = tl.zeros((step * PIXELS, OUTPUTS), tl.float32)
            for prompt in range(0, prompts, COLUMNS):
                if not ONE_PROMPT:
                    row = first * prompts + prompt + col
                    present = prompt + col < prompts
                    costs = _halo_costs(image, text, source, inside, row, present, channels, CHANNELS, PRECISION)
                for p in range(tl.minimum(COLUMNS, prompts - prompt)):
                    for tap in range(0, SIZE * SIZE, TAPS):
                        if not one_matrix:
                            matrix, all_finite = _weights(weight, prompt + p, tap, c, prompts, outputs, SIZE, TAPS)
                            finite = tl.minimum(finite, all_finite)
                        acc = _add_windows(
                            acc, costs, corner + (k + p) * HALO, tap, matrix, halo_width, SIZE, TAPS, PRECISION
                        )
            token = (k + which).to(tl.int64) * height * width + y * width + x
            mask = (valid & (k + which < count))[:, None] & (c < outputs)[None, :]
            tl.store(out + token[:, None] * outputs + c[None, :], acc + b[None, :], mask=mask)
    if finite == 0:
        tl.debug_barrier()  # threads read what other threads have stored
        _add_not_finite(
            out, costs if ONE_PROMPT else None, image, text, weight, source, inside, top, left, first, count,
            prompts, height, width, channels, outputs, tile_height, tile_width, SIZE, PIXELS, 16, CHANNELS, PRECISION,
        )  # fmt: skip


def cost_embedding(image: Tensor, text: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, H, W, E), (T, P, E), (C, P, K, K), (C,) -> (B, T, H, W, C)."""
    batch, height, width, channels = image.shape
    classes, prompts, _ = text.shape
    outputs, size = weight.shape[0], weight.shape[-1]
    out = image.new_empty(batch, classes, height, width, outputs)
    tile = sizes(TILES, image)
    rows, cols = map_tile(height, width, size, HALO.value, tile["ITEMS"])
    groups = cdiv(classes, COLUMNS.value if prompts == 1 else 1)
    output_block = block(outputs, most=tile["OUTPUTS"])
    launch(
        _forward, (batch * groups * cdiv(height, rows) * cdiv(width, cols),),
        image, text, weight, bias, out, classes, prompts, height, width, channels, outputs, rows, cols,
        SIZE=size, TAPS=block(size * size, most=tile["TAPS"]),
        ITEMS=min(128, tile["ITEMS"] * tile["OUTPUTS"] // output_block), PIXELS=block(rows * cols, most=tile["ITEMS"]),
        OUTPUTS=output_block, BLOCKS=cdiv(outputs, output_block), CHANNELS=tile["CHANNELS"],
        ONE_PROMPT=prompts == 1, PRECISION=precision(), **sizes(OPTIONS, image),
    )  # fmt: skip
    return out
