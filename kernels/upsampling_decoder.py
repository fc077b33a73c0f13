"""Guided group normalisation: what a stage of the upsampling decoder does around the library's convolutions:

    z = y + term,   x̂ = (z − mean) / s,   out = ReLU(w ⊙ x̂ + β),   s = √(variance + ε)

with mean and variance over a group's positions and channels, for each image and class; term is the same for all classes
or absent. Moments are computed tile by tile, first the mean, then the centred squares, and combined as Chan, Golub and
LeVeque do: with n, m and q of the tiles, mean = Σ n·m / Σ n, variance = Σ (q + n·(m − mean)²) / Σ n.

Backward, from the gradient g of out, with h = g where out > 0, else 0, and means over a group:

    dy = (w ⊙ h − mean(w ⊙ h) − x̂ · mean(w ⊙ h ⊙ x̂)) / s,   dterm = Σ dy over the classes,   dw = Σ h ⊙ x̂,   dβ = Σ h

A "map" is one class of one image. A tile is a run of positions with all their channels, or several small maps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import block, cdiv, launch

ELEMENTS = 4096  # of a tile: enough bytes in flight for each program, few enough registers for many programs
GRAD_ELEMENTS = 2048  # of a tile of the last backward kernel, which holds dterm too
MOMENTS = 512  # of one kind, that are combined at a time
PROGRAMS = 512  # of the last backward kernel, with dterm: fewer do not fill a GPU, more leave more partial sums


@triton.jit
def _place(m, last, classes, chunk, part, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """For maps m < last: the channels of a tile, its offsets in y and in term, and its mask."""
    m = m.to(tl.int64)[:, None, None]
    row = (chunk * ROWS + tl.arange(0, ROWS))[None, :, None]
    c = part * CHANNELS + tl.arange(0, CHANNELS)
    mask = (m < last) & (row < rows) & (c < channels)[None, None, :]
    offset = row * channels + c[None, None, :]
    return c, m * rows * channels + offset, m // classes * rows * channels + offset, mask


@triton.jit
def _load(y, term, offset, term_offset, mask):
    """z, in float32"""
    z = tl.load(y + offset, mask=mask, other=0.0).to(tl.float32)
    if term is not None:
        z += tl.load(term + term_offset, mask=mask, other=0.0).to(tl.float32)
    return z


@triton.jit
def _load_group(pairs, m, last, c, channels, size):
    """Both numbers of the groups of channels c, (MAPS, 1, CHANNELS) each, from (maps, groups, 2)."""
    place = pairs + (m.to(tl.int64)[:, None] * (channels // size) + (c // size)[None, :]) * 2
    mask = (m < last)[:, None] & (c < channels)[None, :]
    first = tl.load(place, mask=mask, other=0.0)
    return first[:, None, :], tl.load(place + 1, mask=mask, other=0.0)[:, None, :]


@triton.jit
def _affine(z, mean, scale, weight, bias, c, channels):
    """w ⊙ x̂ + β, in PyTorch's order so that an infinite w gives the same as there; and w."""
    w = tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)[None, None, :]
    b = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, None, :]
    slope = scale * w
    return z * slope + (b - mean * slope), w


@triton.jit
def _store_sums(out, first, second, m, maps, chunk, chunks, c, channels):
    """Two numbers for each channel of a tile, (MAPS, CHANNELS) each, into (maps, chunks, 2, D)."""
    place = out + (m.to(tl.int64)[:, None] * chunks + chunk) * 2 * channels + c[None, :]
    mask = (m < maps)[:, None] & (c < channels)[None, :]
    tl.store(place, first, mask=mask)
    tl.store(place + channels, second, mask=mask)


@triton.jit
def _moments(
    y, term, moments, maps, classes, rows, channels,
    MAPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and centred squares of each channel of a tile: `moments`, (maps, chunks, 2, D)."""
    parts = tl.cdiv(channels, CHANNELS)
    chunks = tl.cdiv(rows, ROWS)
    tile = tl.program_id(0) // parts
    m = tile // chunks * MAPS + tl.arange(0, MAPS)
    chunk = tile % chunks
    part = tl.program_id(0) % parts
    c, offset, term_offset, mask = _place(m, maps, classes, chunk, part, rows, channels, ROWS, CHANNELS)
    z = _load(y, term, offset, term_offset, mask)
    mean = tl.sum(z, 1) / tl.minimum(rows - chunk * ROWS, ROWS)
    centred = tl.where(mask, z - mean[:, None, :], 0.0)
    _store_sums(moments, mean, tl.sum(centred * centred, 1), m, maps, chunk, chunks, c, channels)


@triton.jit
def _group_place(group, last, start, chunks, channels, size, CHUNKS: tl.constexpr, SIZE: tl.constexpr):
    """For groups, counted over all maps: offsets of some chunks' numbers in (maps, chunks, 2, D), the chunks and the
    mask, (GROUPS, CHUNKS, SIZE)."""
    groups = channels // size
    chunk = (start + tl.arange(0, CHUNKS))[None, :, None]
    i = tl.arange(0, SIZE)[None, None, :]
    m = (group // groups).to(tl.int64)[:, None, None]
    offset = (m * chunks + chunk) * 2 * channels + (group % groups * size)[:, None, None] + i
    return offset, chunk, (group < last)[:, None, None] & (chunk < chunks) & (i < size)


@triton.jit
def _statistics(
    moments, statistics, last, rows, channels, size, eps,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / s of some groups: `statistics`, (maps, groups, 2)."""
    chunks = tl.cdiv(rows, ROWS)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    weighted = tl.zeros((GROUPS, CHUNKS, SIZE), tl.float32)
    for start in range(0, chunks, CHUNKS):
        offset, chunk, mask = _group_place(group, last, start, chunks, channels, size, CHUNKS, SIZE)
        count = tl.minimum(rows - chunk * ROWS, ROWS).to(tl.float32)
        weighted += tl.where(mask, count * tl.load(moments + offset, mask=mask, other=0.0), 0.0)
    mean = tl.sum(tl.sum(weighted, 2), 1) / (rows * size)
    squares = tl.zeros((GROUPS, CHUNKS, SIZE), tl.float32)
    for start in range(0, chunks, CHUNKS):
        offset, chunk, mask = _group_place(group, last, start, chunks, channels, size, CHUNKS, SIZE)
        count = tl.minimum(rows - chunk * ROWS, ROWS).to(tl.float32)
        distance = tl.load(moments + offset, mask=mask, other=0.0) - mean[:, None, None]
        centred = tl.load(moments + offset + channels, mask=mask, other=0.0)
        squares += tl.where(mask, centred + count * distance * distance, 0.0)
    variance = tl.sum(tl.sum(squares, 2), 1) / (rows * size)
    tl.store(statistics + group * 2, mean, mask=group < last)
    tl.store(statistics + group * 2 + 1, 1.0 / tl.sqrt(variance + eps), mask=group < last)


@triton.jit
def _forward(
    y, term, statistics, weight, bias, out, maps, classes, rows, channels, size,
    MAPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(channels, CHANNELS)
    chunks = tl.cdiv(rows, ROWS)
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # from the end: what was read last may still be cached
    m = program // parts // chunks * MAPS + tl.arange(0, MAPS)
    chunk = program // parts % chunks
    c, offset, term_offset, mask = _place(m, maps, classes, chunk, program % parts, rows, channels, ROWS, CHANNELS)
    mean, scale = _load_group(statistics, m, maps, c, channels, size)
    z = _load(y, term, offset, term_offset, mask)
    normed, _ = _affine(z, mean, scale, weight, bias, c, channels)
    tl.store(out + offset, tl.where(normed < 0, 0.0, normed), mask=mask)


@triton.jit
def _backward_sums(
    grad, y, term, statistics, weight, bias, sums, maps, classes, rows, channels, size,
    MAPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Σ h and Σ h ⊙ x̂ of each channel of a tile: `sums`, (maps, chunks, 2, D)."""
    parts = tl.cdiv(channels, CHANNELS)
    chunks = tl.cdiv(rows, ROWS)
    tile = tl.program_id(0) // parts
    m = tile // chunks * MAPS + tl.arange(0, MAPS)
    chunk = tile % chunks
    part = tl.program_id(0) % parts
    c, offset, term_offset, mask = _place(m, maps, classes, chunk, part, rows, channels, ROWS, CHANNELS)
    mean, scale = _load_group(statistics, m, maps, c, channels, size)
    z = _load(y, term, offset, term_offset, mask)
    normed, _ = _affine(z, mean, scale, weight, bias, c, channels)
    g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
    h = tl.where(normed <= 0, 0.0, g)
    hx = tl.where(mask, h * (z - mean) * scale, 0.0)
    _store_sums(sums, tl.sum(h, 1), tl.sum(hx, 1), m, maps, chunk, chunks, c, channels)


@triton.jit
def _backward_means(
    sums, weight, means, last, rows, channels, size,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """mean(w ⊙ h) and mean(w ⊙ h ⊙ x̂) of some groups: `means`, (maps, groups, 2)."""
    chunks = tl.cdiv(rows, ROWS)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    i = tl.arange(0, SIZE)[None, :]
    c = (group % (channels // size) * size)[:, None] + i
    w = tl.load(weight + c, mask=(group < last)[:, None] & (i < size), other=0.0).to(tl.float32)[:, None, :]
    wh = tl.zeros((GROUPS, CHUNKS, SIZE), tl.float32)
    whx = tl.zeros((GROUPS, CHUNKS, SIZE), tl.float32)
    for start in range(0, chunks, CHUNKS):
        offset, _, mask = _group_place(group, last, start, chunks, channels, size, CHUNKS, SIZE)
        wh += w * tl.load(sums + offset, mask=mask, other=0.0)
        whx += w * tl.load(sums + offset + channels, mask=mask, other=0.0)
    tl.store(means + group * 2, tl.sum(tl.sum(wh, 2), 1) / (rows * size), mask=group < last)
    tl.store(means + group * 2 + 1, tl.sum(tl.sum(whx, 2), 1) / (rows * size), mask=group < last)


@triton.jit
def _backward(
    grad, y, term, statistics, means, weight, bias, y_grad, term_parts, classes, classes_each, rows, channels, size,
    TERM_GRAD: tl.constexpr, MAPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dy of a tile for `classes_each` classes, and their share of dterm: `term_parts`, (B, splits, positions, D)."""
    parts = tl.cdiv(channels, CHANNELS)
    chunks = tl.cdiv(rows, ROWS)
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # from the end, as in the forward
    chunk = program // parts % chunks
    part = program % parts
    split = program // parts // chunks
    splits = tl.cdiv(classes, classes_each)
    image = split // splits
    first = image * classes + split % splits * classes_each
    last = tl.minimum(first + classes_each, (image + 1) * classes)
    acc = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(first, last, MAPS):
        m = start + tl.arange(0, MAPS)
        c, offset, term_offset, mask = _place(m, last, classes, chunk, part, rows, channels, ROWS, CHANNELS)
        mean, scale = _load_group(statistics, m, last, c, channels, size)
        mean_wh, mean_whx = _load_group(means, m, last, c, channels, size)
        z = _load(y, term, offset, term_offset, mask)
        g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
        normed, w = _affine(z, mean, scale, weight, bias, c, channels)
        h = tl.where(normed <= 0, 0.0, g)
        z_grad = scale * (w * h - mean_wh - (z - mean) * scale * mean_whx)
        tl.store(y_grad + offset, z_grad, mask=mask)
        if TERM_GRAD:
            acc += tl.sum(tl.where(mask, z_grad, 0.0), 0)
    if TERM_GRAD:
        row = (chunk * ROWS + tl.arange(0, ROWS))[:, None]
        c = (part * CHANNELS + tl.arange(0, CHANNELS))[None, :]
        offset = (split.to(tl.int64) * rows + row) * channels + c
        tl.store(term_parts + offset, acc, mask=(row < rows) & (c < channels))


def _tiles(y: Tensor, elements: int) -> tuple[int, int, dict[str, int]]:
    """Chunks and channel parts that tiles cut a map into, and the size of the tiles."""
    rows, channels = y.shape[2] * y.shape[3], y.shape[4]
    width = block(channels, least=1)
    height = block(rows, least=1, most=elements // width)
    tile = {"MAPS": elements // (height * width), "ROWS": height, "CHANNELS": width}
    return cdiv(rows, height), cdiv(channels, width), tile


def _combined(groups: int, channels: int, chunks: int, rows_each: int) -> dict[str, int]:
    """Block sizes where the moments of tiles of `rows_each` positions are combined."""
    size = triton.next_power_of_2(channels // groups)
    together = block(chunks, least=1, most=max(MOMENTS // size, 1))
    return {"ROWS": rows_each, "GROUPS": max(MOMENTS // (size * together), 1), "CHUNKS": together, "SIZE": size}


def guided_group_norm(
    y: Tensor, term: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """(B, T, H, W, D) and (B, H, W, D) -> out (B, T, H, W, D), and mean and 1 / s of each group, (B, T, groups, 2)."""
    batch, classes, height, width, channels = y.shape
    maps, rows, size = batch * classes, height * width, channels // groups
    chunks, parts, tile = _tiles(y, ELEMENTS)
    combined = _combined(groups, channels, chunks, tile["ROWS"])
    programs = cdiv(maps, tile["MAPS"]) * chunks * parts
    out = torch.empty_like(y)
    moments = y.new_empty(maps, chunks, 2, channels, dtype=torch.float32)
    statistics = y.new_empty(batch, classes, groups, 2, dtype=torch.float32)
    launch(_moments, (programs,), y, term, moments, maps, classes, rows, channels, **tile)
    blocks = cdiv(maps * groups, combined["GROUPS"])
    launch(_statistics, (blocks,), moments, statistics, maps * groups, rows, channels, size, eps, **combined, warps=1)
    launch(_forward, (programs,), y, term, statistics, weight, bias, out, maps, classes, rows, channels, size, **tile)
    return out, statistics


def guided_group_norm_backward(
    grad: Tensor, statistics: Tensor, y: Tensor, term: Tensor | None, weight: Tensor, bias: Tensor,
    groups: int, eps: float, needs: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of y, term, weight and bias."""
    batch, classes, height, width, channels = y.shape
    maps, rows, size = batch * classes, height * width, channels // groups
    chunks, parts, tile = _tiles(y, ELEMENTS)
    combined = _combined(groups, channels, chunks, tile["ROWS"])
    sums = y.new_empty(maps, chunks, 2, channels, dtype=torch.float32)
    launch(
        _backward_sums, (cdiv(maps, tile["MAPS"]) * chunks * parts,),
        grad, y, term, statistics, weight, bias, sums, maps, classes, rows, channels, size, **tile,
    )  # fmt: skip
    bias_grad, weight_grad = (part.sum((0, 1)).to(y.dtype) for part in sums.unbind(2))
    if not any(needs[:2]):
        return [None, None, weight_grad, bias_grad]
    means = torch.empty_like(statistics)
    blocks = cdiv(maps * groups, combined["GROUPS"])
    launch(_backward_means, (blocks,), sums, weight, means, maps * groups, rows, channels, size, **combined, warps=1)
    y_grad = torch.empty_like(y)
    chunks, parts, tile = _tiles(y, GRAD_ELEMENTS)
    # Without a sum over the classes, a program takes no more of them than a tile holds.
    splits = max(PROGRAMS // max(batch * chunks * parts, 1), 1) if needs[1] else classes
    classes_each = cdiv(cdiv(classes, splits), tile["MAPS"]) * tile["MAPS"]
    splits = cdiv(classes, classes_each)
    term_parts = y.new_empty(batch if needs[1] else 0, splits, height, width, channels, dtype=torch.float32)
    launch(
        _backward, (batch * splits * chunks * parts,),
        grad, y, term, statistics, means, weight, bias, y_grad, term_parts,
        classes, classes_each, rows, channels, size, **tile, TERM_GRAD=needs[1],
    )  # fmt: skip
    return [y_grad, term_parts.sum(1).to(y.dtype), weight_grad, bias_grad]
