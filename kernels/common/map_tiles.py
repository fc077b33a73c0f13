"""Rectangular tiles of a map, each with its halo: the pixels around it that a convolution reads."""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl

from .launch import cdiv


@lru_cache(maxsize=256)
def map_tile(height: int, width: int, size: int, halo: int, most: int) -> tuple[int, int]:
    """Height and width of as few tiles of a map as possible, for windows of `size` × `size`. A tile has at most `most`
    pixels, with its halo at most `halo`. Ties go to the smallest halo, then to the widest."""
    ranked = []
    for rows in range(1, min(height, most, halo // size - size + 1) + 1):
        columns = min(width, most // rows, halo // (rows + size - 1) - size + 1)
        tiles = cdiv(height, rows) * cdiv(width, columns)
        ranked.append((tiles, (rows + size - 1) * (columns + size - 1), rows, columns))
    return min(ranked)[2:]


@triton.jit
def halo_pixels(
    tile, height, width, tile_height, tile_width, SIZE: tl.constexpr, HALO: tl.constexpr, MAPS: tl.constexpr
):  # fmt: skip
    """A tile's first row and column; then row and column of each pixel of it and its halo, and whether it lies within
    the map, row by row, for MAPS maps one after the other: (MAPS · HALO,)."""
    tiles = tl.cdiv(width, tile_width)
    top = tile // tiles * tile_height
    left = tile % tiles * tile_width
    pixel = tl.arange(0, MAPS * HALO) % HALO
    row = pixel // (tile_width + SIZE - 1)
    y = top - SIZE // 2 + row
    x = left - SIZE // 2 + pixel % (tile_width + SIZE - 1)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (row < tile_height + SIZE - 1)
    return top, left, y, x, inside


@triton.jit
def tile_pixels(
    top, left, height, width, tile_height, tile_width,
    SIZE: tl.constexpr, HALO: tl.constexpr, PIXELS: tl.constexpr, MAPS: tl.constexpr,
):  # fmt: skip
    """Of each pixel of a tile, for MAPS maps one after the other, (MAPS · PIXELS,): the map's number, row, column,
    whether it lies within the map, and the index of its window's first pixel among those of `halo_pixels`."""
    which = tl.arange(0, MAPS * PIXELS) // PIXELS
    pixel = tl.arange(0, MAPS * PIXELS) % PIXELS
    row = pixel // tile_width
    col = pixel % tile_width
    valid = (row < tile_height) & (top + row < height) & (left + col < width)
    corner = which * HALO + tl.where(valid, row * (tile_width + SIZE - 1) + col, 0)
    return which, top + row, left + col, valid, corner
