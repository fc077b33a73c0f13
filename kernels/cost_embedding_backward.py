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

# Of dcost: pixels of a tile without and with its halo, channels of the gradient read at a time, and elements of the
# window at a time. The larger the tile, the fewer pixels belong to several halos. By bytes of an element.
COST_TILES = {
    2: {"PIXELS": 64, "HALO": 256, "CHANNELS": 32, "TAPS": 64},
    4: {"PIXELS": 32, "HALO": 128, "CHANNELS": 32, "TAPS": 64},
}
# Of dweight: tokens read at a time, channels and elements of the window that a program sums.
WEIGHT_TILES = {
    2: {"ITEMS": 32, "CHANNELS": 128, "TAPS": 64},
    4: {"ITEMS": 32, "CHANNELS": 32, "TAPS": 32},
}
PARTS = 256  # programs, about, that share the sum of dweight, each with a partial sum of its own


@triton.jit
def _cost_gradient(
    grad, weight, out, maps, prompts, height, width, channels, tile_height, tile_width,
    SIZE: tl.constexpr, PIXELS: tl.constexpr, HALO: tl.constexpr, TOGETHER: tl.constexpr, CHANNELS: tl.constexpr,
    TAPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the gradients of TOGETHER maps: z of the tile and its halo, then the sums along z's diagonals."""
    tiles = tl.cdiv(height, tile_height) * tl.cdiv(width, tile_width)
    top, left, y, x, inside = halo_pixels(
        tl.program_id(0) % tiles, height, width, tile_height, tile_width, SIZE, HALO, TOGETHER
    )  # fmt: skip
    first = (tl.program_id(0) // tiles).to(tl.int64) * TOGETHER
    prompt = tl.program_id(0) // tiles % prompts  # maps of several prompts are not taken together
    grad += first // prompts * height * width * channels
    halo_map = tl.arange(0, TOGETHER * HALO) // HALO
    inside = inside & (first + halo_map < maps)
    token = (halo_map * height + y) * width + x
    which, y, x, real, corner = tile_pixels(
        top, left, height, width, tile_height, tile_width, SIZE, HALO, PIXELS, TOGETHER
    )  # fmt: skip
    total = tl.zeros((TOGETHER * PIXELS,), tl.float32)
    for start_tap in range(0, SIZE * SIZE, TAPS):
        tap = start_tap + tl.arange(0, TAPS)
        z = tl.zeros((TOGETHER * HALO, TAPS), tl.float32)
        for start in range(0, channels, CHANNELS):
            c = start + tl.arange(0, CHANNELS)
            g = tl.load(
                grad + token[:, None] * channels + c[None, :],
                mask=inside[:, None] & (c < channels)[None, :], other=0.0,
            )  # fmt: skip
            w = tl.load(
                weight + (c * prompts + prompt)[:, None] * (SIZE * SIZE) + tap[None, :],
                mask=(c < channels)[:, None] & (tap < SIZE * SIZE)[None, :], other=0.0,
            )  # fmt: skip
            z = dot(g, w, z, PRECISION)
        # Element (i, j) of the window belongs to z of the pixel K − 1 − i below and K − 1 − j right of the first one.
        place = (SIZE - 1 - tap // SIZE) * (tile_width + SIZE - 1) + SIZE - 1 - tap % SIZE
        valid = tap < SIZE * SIZE
        index = (corner[:, None] + tl.where(valid, place, 0)[None, :]) * TAPS + tl.arange(0, TAPS)[None, :]
        terms = tl.gather(
            tl.reshape(z, (TOGETHER * HALO * TAPS,)), tl.reshape(index, (TOGETHER * PIXELS * TAPS,)), 0
        )  # fmt: skip
        total += tl.sum(tl.where(valid[None, :], tl.reshape(terms, index.shape), 0.0), 1)
    tl.store(out + ((first + which) * height + y) * width + x, total, mask=real & (first + which < maps))


@triton.jit
def _weight_gradient(
    grad, cost, out, tokens, prompts, height, width, channels, blocks, parts,
    SIZE: tl.constexpr, ITEMS: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One part's sum, (TAPS, CHANNELS) of (ROWS, channels), over its share of the blocks of tokens. The row behind the
    window's K² is that of a cost of 1: the gradient of the bias."""
    part = tl.program_id(0) % parts
    channel_tiles = tl.cdiv(channels, CHANNELS)
    place = tl.program_id(0) // parts
    c = place % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    place = place // channel_tiles
    tap = place % (ROWS // TAPS) * TAPS + tl.arange(0, TAPS)
    prompt = place // (ROWS // TAPS)
    pixels = height * width
    i = tap // SIZE - SIZE // 2
    j = tap % SIZE - SIZE // 2
    real = tap < SIZE * SIZE
    total = tl.zeros((TAPS, CHANNELS), tl.float32)
    share = tl.cdiv(blocks, parts)
    for step in range(share):
        first = (part.to(tl.int64) * share + step) * ITEMS
        item = tl.arange(0, ITEMS)
        mask = first + item < tokens
        g = tl.load(
            grad + first * channels + item[:, None] * channels + c[None, :],
            mask=mask[:, None] & (c < channels)[None, :], other=0.0,
        )  # fmt: skip
        before = first // pixels  # maps before that of the first token
        pixel = (first - before * pixels).to(tl.int32) + item
        volume = cost + (before * prompts + prompt) * pixels
        source = pixel // pixels * prompts * pixels + pixel % pixels
        y = pixel % pixels // width
        x = pixel % width
        y = y[:, None] + i[None, :]
        x = x[:, None] + j[None, :]
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & mask[:, None] & real[None, :]
        windows = tl.load(volume + source[:, None] + (i * width + j)[None, :], mask=inside, other=0.0).to(tl.float32)
        windows = tl.where((tap == SIZE * SIZE)[None, :], 1.0, windows)
        total = dot(tl.trans(windows.to(grad.dtype.element_ty)), g, total, PRECISION)
    target = out + ((part * prompts + prompt).to(tl.int64) * ROWS + tap)[:, None] * channels + c[None, :]
    tl.store(target, total, mask=(c < channels)[None, :])


def cost_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """(B, T, H, W, C), (C, P, K, K) -> (B, T, P, H, W)."""
    batch, classes, height, width, channels = grad.shape
    prompts, size = weight.shape[1], weight.shape[-1]
    out = grad.new_empty(batch, classes, prompts, height, width)
    tile = sizes(COST_TILES, grad)
    rows, columns = map_tile(height, width, size, tile["HALO"], tile["PIXELS"])
    halo = block((rows + size - 1) * (columns + size - 1), most=tile["HALO"])
    together = tile["HALO"] // halo if prompts == 1 else 1
    maps = batch * classes * prompts
    launch(
        _cost_gradient, (cdiv(maps, together) * cdiv(height, rows) * cdiv(width, columns),),
        grad, weight, out, maps, prompts, height, width, channels, rows, columns,
        SIZE=size, PIXELS=block(rows * columns, most=tile["PIXELS"]), HALO=halo, TOGETHER=together,
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
    weight_grad = total[:, : size * size].permute(2, 0, 1).reshape(weight.shape)
    return weight_grad.to(weight.dtype).contiguous(), total[0, size * size].to(weight.dtype, copy=True)
