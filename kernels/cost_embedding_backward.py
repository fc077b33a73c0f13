"""Backward of the cost embedding's convolution. From the gradient g of its output, with r = K // 2:

    z[y, x, i, j]         = Σ_c g[b, t, y, x, c] · weight[c, p, i, j]
    dcost[b, t, p, y, x]  = Σ_ij z[y + r − i, x + r − j, i, j]
    dweight[c, p, i, j]   = Σ_btyx g[b, t, y, x, c] · cost[b, t, p, y + i − r, x + j − r]
    dbias[c]              = Σ_btyx g[b, t, y, x, c]

where g and cost are 0 outside the map. From dcost the gradients of both embeddings follow as in `cost_volume.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import block, cdiv, launch, precision, sizes
from .common.map_tiles import halo_pixels, map_tile, tile_pixels
from .common.math import dot

# By bytes of an element, of dcost: pixels of a tile without and with its halo, channels and elements of the window per
# step. The larger the tile, the fewer pixels belong to several halos.
COST_TILES = {
    2: {"PIXELS": 64, "HALO": 256, "CHANNELS": 32, "TAPS": 64},
    4: {"PIXELS": 32, "HALO": 128, "CHANNELS": 32, "TAPS": 64},
}
# Of dweight: tokens per step, channels and elements of the window of a program.
WEIGHT_TILES = {2: {"ITEMS": 32, "CHANNELS": 128, "TAPS": 64}, 4: {"ITEMS": 32, "CHANNELS": 32, "TAPS": 32}}
PARTS = 256  # programs, about, that each take a partial sum of dweight


@triton.jit
def _cost_gradient(
    grad, weight, out, maps, prompts, height, width, channels, tile_height, tile_width,
    SIZE: tl.constexpr, PIXELS: tl.constexpr, HALO: tl.constexpr, MAPS: tl.constexpr, CHANNELS: tl.constexpr,
    TAPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the gradients of MAPS maps: z of the tile and its halo, then the sums along z's diagonals."""
    tiles = tl.cdiv(height, tile_height) * tl.cdiv(width, tile_width)
    tile = tl.program_id(0) % tiles
    top, left, y, x, inside = halo_pixels(tile, height, width, tile_height, tile_width, SIZE, HALO, MAPS)
    first = (tl.program_id(0) // tiles).to(tl.int64) * MAPS
    prompt = tl.program_id(0) // tiles % prompts  # with several prompts MAPS is 1
    grad += first // prompts * height * width * channels
    which = tl.arange(0, MAPS * HALO) // HALO
    inside = inside & (first + which < maps)
    token = (which * height + y) * width + x
    which, y, x, real, corner = tile_pixels(top, left, height, width, tile_height, tile_width, SIZE, HALO, PIXELS, MAPS)
    acc = tl.zeros((MAPS * PIXELS,), tl.float32)
    for first_tap in range(0, SIZE * SIZE, TAPS):
        tap = first_tap + tl.arange(0, TAPS)
        valid = tap < SIZE * SIZE
        z = tl.zeros((MAPS * HALO, TAPS), tl.float32)
        for start in range(0, channels, CHANNELS):
            c = start + tl.arange(0, CHANNELS)
            mask = inside[:, None] & (c < channels)[None, :]
            g = tl.load(grad + token[:, None] * channels + c[None, :], mask=mask, other=0.0)
            offset = (c * prompts + prompt)[:, None] * (SIZE * SIZE) + tap[None, :]
            w = tl.load(weight + offset, mask=(c < channels)[:, None] & valid[None, :], other=0.0)
            z = dot(g, w, z, PRECISION)
        # Element (i, j) of the window belongs to z of the pixel K − 1 − i below and K − 1 − j right of the first one.
        shift = (SIZE - 1 - tap // SIZE) * (tile_width + SIZE - 1) + SIZE - 1 - tap % SIZE
        index = (corner[:, None] + tl.where(valid, shift, 0)[None, :]) * TAPS + tl.arange(0, TAPS)[None, :]
        terms = tl.gather(tl.reshape(z, (MAPS * HALO * TAPS,)), tl.reshape(index, (MAPS * PIXELS * TAPS,)), 0)
        acc += tl.sum(tl.where(valid[None, :], tl.reshape(terms, index.shape), 0.0), 1)
    tl.store(out + ((first + which) * height + y) * width + x, acc, mask=real & (first + which < maps))


@triton.jit
def _weight_gradient(
    grad, cost, out, tokens, prompts, height, width, channels, blocks, parts,
    SIZE: tl.constexpr, ITEMS: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A partial sum, (TAPS, CHANNELS) of (ROWS, channels), over one part of the blocks of tokens. The row behind the
    window's K² is that of a cost of 1: the gradient of the bias."""
    part = tl.program_id(0) % parts
    channel_tiles = tl.cdiv(channels, CHANNELS)
    tile = tl.program_id(0) // parts
    c = tile % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    tap = tile // channel_tiles % (ROWS // TAPS) * TAPS + tl.arange(0, TAPS)
    prompt = tile // channel_tiles // (ROWS // TAPS)
    pixels = height * width
    i = tap // SIZE - SIZE // 2
    j = tap % SIZE - SIZE // 2
    valid = tap < SIZE * SIZE
    acc = tl.zeros((TAPS, CHANNELS), tl.float32)
    steps = tl.cdiv(blocks, parts)
    for step in range(steps):
        first = (part.to(tl.int64) * steps + step) * ITEMS
        item = tl.arange(0, ITEMS)
        mask = first + item < tokens
        offset = first * channels + item[:, None] * channels + c[None, :]
        g = tl.load(grad + offset, mask=mask[:, None] & (c < channels)[None, :], other=0.0)
        first_map = first // pixels
        pixel = (first - first_map * pixels).to(tl.int32) + item
        volume = cost + (first_map * prompts + prompt) * pixels
        source = pixel // pixels * prompts * pixels + pixel % pixels
        y = pixel % pixels // width
        x = pixel % width
        y = y[:, None] + i[None, :]
        x = x[:, None] + j[None, :]
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & mask[:, None] & valid[None, :]
        windows = tl.load(volume + source[:, None] + (i * width + j)[None, :], mask=inside, other=0.0).to(tl.float32)
        windows = tl.where((tap == SIZE * SIZE)[None, :], 1.0, windows)
        acc = dot(tl.trans(windows.to(grad.dtype.element_ty)), g, acc, PRECISION)
    offset = ((part * prompts + prompt).to(tl.int64) * ROWS + tap)[:, None] * channels + c[None, :]
    tl.store(out + offset, acc, mask=(c < channels)[None, :])


def cost_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """(B, T, H, W, C), (C, P, K, K) -> (B, T, P, H, W)."""
    batch, classes, height, width, channels = grad.shape
    prompts, size = weight.shape[1], weight.shape[-1]
    out = grad.new_empty(batch, classes, prompts, height, width)
    tile = sizes(COST_TILES, grad)
    rows, columns = map_tile(height, width, size, tile["HALO"], tile["PIXELS"])
    halo = block((rows + size - 1) * (columns + size - 1), most=tile["HALO"])
    per_program = tile["HALO"] // halo if prompts == 1 else 1
    maps = batch * classes * prompts
    launch(
        _cost_gradient, (cdiv(maps, per_program) * cdiv(height, rows) * cdiv(width, columns),),
        grad, weight, out, maps, prompts, height, width, channels, rows, columns,
        SIZE=size, PIXELS=block(rows * columns, most=tile["PIXELS"]), HALO=halo, MAPS=per_program,
        CHANNELS=tile["CHANNELS"], TAPS=block(size * size, most=tile["TAPS"]), PRECISION=precision(), warps=8, stages=3,
    )  # fmt: skip
    return out


def weight_gradient(grad: Tensor, cost: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, H, W, C), (B, T, P, H, W) -> gradients of the weight, (C, P, K, K), and the bias, (C,)."""
    batch, classes, height, width, channels = grad.shape
    prompts, size = weight.shape[1], weight.shape[-1]
    tile = sizes(WEIGHT_TILES, grad)
    taps = block(size * size + 1, most=tile["TAPS"])
    rows = cdiv(size * size + 1, taps) * taps
    outputs = block(channels, most=tile["CHANNELS"])
    tokens = batch * classes * height * width
    blocks = cdiv(tokens, tile["ITEMS"])
    sums = prompts * rows // taps * cdiv(channels, outputs)
    parts = cdiv(blocks, max(cdiv(blocks * sums, PARTS), 1))
    partial = grad.new_empty(parts, prompts, rows, channels, dtype=torch.float32)
    launch(
        _weight_gradient, (parts * sums,),
        grad, cost, partial, tokens, prompts, height, width, channels, blocks, parts,
        SIZE=size, ITEMS=tile["ITEMS"], CHANNELS=outputs, TAPS=taps, ROWS=rows, PRECISION=precision(), warps=8,
    )  # fmt: skip
    total = partial.sum(0)
    weight_grad = total[:, : size * size].permute(2, 0, 1).reshape(weight.shape).to(weight.dtype)
    return weight_grad, total[0, size * size].to(weight.dtype, copy=True)
