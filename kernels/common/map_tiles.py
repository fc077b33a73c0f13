"""Rectangular tiles of a map, each with the halo of pixels that a convolution's window reaches around it."""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl

from .launch import cdiv


@lru_cache(maxsize=256)
def map_tile(height: int, width: int, size: int, halo: int, most: int) -> tuple[int, int]:
    """Height and width of the tiles of a map for windows of `size` × `size`: as few as can be.

    A tile with its halo has at most `halo` pixels, without it at most `most`. Of equally few the tile with the smallest
    halo is taken, then the wider one.
    """
    best = None
    for rows in range(1, min(height, most, halo // size - size + 1) + 1):
        columns = min(width, most // rows, halo // (rows + size - 1) - size + 1)
        tiles = cdiv(height, rows) * cdiv(width, columns)
        rank = (tiles, (rows + size - 1) * (columns + size - 1), rows)
        best = min(best, (rank, columns)) if best else (rank, columns)
    (_, _, rows), columns = best
    return rows, columns


@triton.jit
def halo_pixels(
    tile, height, width, tile_height, tile_width,
    SIZE: tl.constexpr, HALO: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """The pixels of a tile and its halo, row by row, for TOGETHER maps one after the other: (TOGETHER · HALO,).

    Returns the tile's first row and column; then of each pixel its row and column in the map, and whether it lies
    within it.
    """
    tiles = tl.cdiv(width, tile_width)
    top = tile // tiles * tile_height
    left = tile % tiles * tile_width
    row = tl.arange(0, TOGETHER * HALO) % HALO // (tile_width + SIZE - 1)
    y = top - SIZE // 2 + row
    x = left - SIZE // 2 + tl.arange(0, TOGETHER * HALO) % HALO % (tile_width + SIZE - 1)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (row < tile_height + SIZE - 1)
    return top, left, y, x, inside


@triton.jit
def tile_pixels(
    top, left, height, width, tile_height, tile_width,
    SIZE: tl.constexpr, HALO: tl.constexpr, PIXELS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """The pixels of a tile, row by row, for TOGETHER maps one after the other: (TOGETHER · PIXELS,).

    Returns which of the maps it is in, row, column, whether it lies within the map, and the place of its window's first
    pixel among those that `halo_pixels` gives.
    """
    which = tl.arange(0, TOGETHER * PIXELS) // PIXELS
    pixel = tl.arange(0, TOGETHER * PIXELS) % PIXELS
    row = pixel // tile_width
    column = pixel % tile_width
    real = (row < tile_height) & (top + row < height) & (left + column < width)
    corner = which * HALO + tl.where(real, row * (tile_width + SIZE - 1) + column, 0)
    return which, top + row, left + column, real, corner
