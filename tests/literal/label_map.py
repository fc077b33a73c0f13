"""From the logits of sliding windows to one probability map, whole tensors at full size.

CAT-Seg: arXiv 2303.11797; Cascade-CLIP: arXiv 2406.00670.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._layers import resize


def overlap_average(windows: Tensor, corners: Sequence[tuple[int, int]], size: tuple[int, int]) -> Tensor:
    """Windows (N, T, h, w) laid at their (top, left) corners and averaged by count where they overlap: (T, H, W)."""
    if len(windows) != len(corners):
        raise ValueError(f"windows holds {len(windows)} maps, expected {len(corners)}, one per window position")
    h, w = windows.shape[-2:]
    total = windows.new_zeros(windows.shape[1], *size)
    counts = windows.new_zeros(size)
    for window, (top, left) in zip(windows, corners, strict=True):
        total[:, top : top + h, left : left + w] += window
        counts[top : top + h, left : left + w] += 1
    return total / counts


def catseg_corners(size: int = 640, window: int = 384, overlap: float = 0.333) -> list[tuple[int, int]]:
    """Corners of CAT-Seg's windows on a square of side `size`, row by row."""
    stride = int(window * (1 - overlap))
    starts = range(0, size - window + 1, stride)
    return [(top, left) for top in starts for left in starts]


def catseg_label_map(logits: Tensor, out_size: tuple[int, int], size: int = 640, window: int = 384) -> Tensor:
    """Probabilities of CAT-Seg's sliding mode.

    logits (windows + 1, T, h, w): the windows of the image resized to `size`, row by row, then the whole image;
    out_size (H, W) in pixels -> (T, H, W) in 0..1. Sigmoid comes before every averaging and the last resize.
    """
    probabilities = torch.sigmoid(resize(logits, (window, window)))
    local = overlap_average(probabilities[:-1], catseg_corners(size, window), (size, size))
    whole = resize(probabilities[-1:], (size, size))
    return resize((local[None] + whole) / 2, out_size)[0]


def cascade_corners(image_size: tuple[int, int], crop: int = 512, stride: int = 426) -> list[tuple[int, int]]:
    """Corners of Cascade-CLIP's windows on an image (height, width), row by row; the last is shifted back inside."""
    if min(image_size) < crop:
        raise ValueError(f"image_size is {tuple(image_size)}, expected sides of at least the crop {crop}")
    tops, lefts = (
        [min(i * stride, side - crop) for i in range((side - crop + stride - 1) // stride + 1)] for side in image_size
    )
    return [(top, left) for top in tops for left in lefts]


def cascade_scores(masks: Tensor, seen: Tensor | Sequence[int], penalty: float = 0.1) -> Tensor:
    """Sigmoid of mask logits (..., T, H, W) with `penalty` taken from the classes whose indices are in `seen`."""
    scores = torch.sigmoid(masks)
    subtract = scores.new_zeros(scores.shape[-3])
    subtract[torch.as_tensor(seen, device=masks.device)] = penalty
    return scores - subtract[:, None, None]


def cascade_window_average(
    masks: Tensor,
    image_size: tuple[int, int],
    seen: Tensor | Sequence[int],
    penalty: float = 0.1,
    crop: int = 512,
    stride: int = 426,
) -> Tensor:
    """Averaged class scores, which can be negative: masks (windows, T, h, w) -> (T, *image_size)."""
    scores = cascade_scores(resize(masks, (crop, crop)), seen, penalty)
    return overlap_average(scores, cascade_corners(image_size, crop, stride), image_size)


def cascade_label_map(
    masks: Tensor,
    image_size: tuple[int, int],
    out_size: tuple[int, int],
    seen: Tensor | Sequence[int],
    penalty: float = 0.1,
    crop: int = 512,
    stride: int = 426,
) -> Tensor:
    """Probabilities of Cascade-CLIP's sliding mode.

    masks (windows, T, h, w): mask logits of the crops of an image of `image_size`, row by row; out_size (H, W) in
    pixels, the original image's; seen: indices of the classes of training -> (T, H, W), softmax over the classes.
    """
    scores = cascade_window_average(masks, image_size, seen, penalty, crop, stride)
    return resize(scores[None], out_size)[0].softmax(dim=0)
