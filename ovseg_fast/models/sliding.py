"""How one picture is cut into model inputs, and how their logits fit together again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ASPECT = 32  # beyond this, sliding windows over one picture run into the hundreds


@dataclass(frozen=True)
class Windows:
    """Model inputs cut from one picture.

    Attributes:
        pixels: (N, 3, h, w) float, RGB in 0..255. With `has_whole` the last one shows the whole picture.
        positions: (top, left) of each window on the canvas, in pixels.
        window: (height, width) in pixels that each window covers on the canvas.
        canvas: (height, width) in pixels of the resized picture that the windows were cut from.
        has_whole: whether the last of `pixels` is the whole picture, to be averaged with the canvas.
        cut: (height, width) to which logits are cut before anything else, or None.
        decode: keyword arguments of the model's `decode` for these windows; it may then give `ops.KeptLogits`.
    """

    pixels: Tensor
    positions: list[tuple[int, int]]
    window: tuple[int, int]
    canvas: tuple[int, int]
    has_whole: bool = False
    cut: tuple[int, int] | None = None
    decode: Mapping[str, Any] = field(default_factory=dict)


def to_pixels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 3, h, w) uint8, or floating point in 0..1, to 0..255 in `dtype`.

    Raises:
        TypeError: another dtype. ValueError: another shape.
    """
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images must have shape (B, 3, h, w) with no size zero, got {tuple(images.shape)}.")
    if images.dtype == torch.uint8:
        return images.to(dtype)
    if not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating point in 0..1, got {images.dtype}.")
    return (images.to(torch.promote_types(images.dtype, dtype)) * 255).to(dtype)


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """(B, C, h, w) -> (B, C, height, width), bilinear without antialiasing, corners not aligned."""
    # The same size comes out unchanged either way; a compiler would specialise its graph on the comparison.
    if not torch.compiler.is_compiling() and tuple(images.shape[-2:]) == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bilinear", align_corners=False)


def square_windows(image: Tensor, side: int, stride: int, *, whole: bool = False) -> Windows:
    """Resize one image (3, H, W) to a shorter side of `side` (`whole`: to `side` × `side`), and cut square windows.

    Raises:
        ValueError: without `whole`, one side of the image is more than 32 times the other.
    """
    height, width = image.shape[-2:]
    canvas = (side, side)
    if not whole:
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise ValueError(
                f"image is {width} × {height} pixels, 'slide' takes at most {MAX_ASPECT}:1; cut it or use 'whole'."
            )
        scale = side / min(height, width)
        canvas = (max(side, int(height * scale + 0.5)), max(side, int(width * scale + 0.5)))
    pixels, positions = crops(resize(image.unsqueeze(0), *canvas), side, stride)
    return Windows(pixels, positions, (side, side), canvas)


def crops(image: Tensor, side: int, stride: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """(1, C, H, W) -> windows (N, C, side, side) and their positions (top, left)."""
    rows, columns = (window_starts(size, side, stride) for size in image.shape[-2:])
    positions = [(top, left) for top in rows for left in columns]
    return torch.cat([image[..., top : top + side, left : left + side] for top, left in positions]), positions


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """Starts of windows along an axis of `size` ≥ `window` pixels; the last window ends at the border."""
    count = max(size - window + stride - 1, 0) // stride + 1
    return [min(index * stride, size - window) for index in range(count)]
