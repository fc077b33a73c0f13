"""How a method cuts one picture into model inputs, and how their logits go together again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
        decode: keyword arguments of the model's `decode` that go with this way of cutting.
    """

    pixels: Tensor
    positions: list[tuple[int, int]]
    window: tuple[int, int]
    canvas: tuple[int, int]
    has_whole: bool = False
    cut: tuple[int, int] | None = None
    decode: Mapping[str, Any] = field(default_factory=dict)


def to_pixels(images: Tensor) -> Tensor:
    """(B, 3, h, w) uint8, or floating point in 0..1, to floating point in 0..255.

    Raises:
        TypeError: another dtype. ValueError: another shape.
    """
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images must have shape (B, 3, h, w) with no size zero, got {tuple(images.shape)}.")
    if images.dtype == torch.uint8:
        return images.to(torch.get_default_dtype())
    if not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating point in 0..1, got {images.dtype}.")
    return images * 255


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """(B, C, h, w) -> (B, C, height, width), bilinear without antialiasing, corners not aligned."""
    # The same size comes out unchanged either way; a compiler would tie its graph to what the comparison says.
    if not torch.compiler.is_compiling() and tuple(images.shape[-2:]) == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bilinear", align_corners=False)


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """Starts of windows along an axis of `size` ≥ `window` pixels; the last one is shifted back to end at the
    border."""
    count = max(size - window + stride - 1, 0) // stride + 1
    return [min(index * stride, size - window) for index in range(count)]
