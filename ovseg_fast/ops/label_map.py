"""Label map: from low-resolution logits of one image's windows to one label a pixel.

    p_n    = sigmoid(resize(logits_n, window)) − offset              every window
    canvas = Σ_n p_n at its position / number of windows there
    canvas = ½ (canvas + resize(sigmoid(resize(whole, window)), canvas))     where a map of the whole image is given
    scores = resize(canvas, size),   labels = argmax_t scores

All resizing is bilinear, corners not aligned. Exact rewrite: a few classes and rows are worked out at a time while
only the best score and label of each pixel are kept, so memory does not grow with the number of classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_positive, check_tensors
from ._tiles import tiles

CHUNK_ELEMENTS = 2**22  # scores worked on at a time: 16 MB in float32


def label_map(
    logits: Tensor,
    positions: Sequence[tuple[int, int]],
    *,
    window: tuple[int, int],
    canvas: tuple[int, int],
    size: tuple[int, int],
    whole: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """The best class of every pixel (CAT-Seg, section 4 and its supplement; Cascade-CLIP, section 4.1).

    Args:
        logits: (N, T, h, w), one map a window.
        positions: N pairs (top, left) of the windows on the canvas, in pixels.
        window: (height, width) in pixels that each window covers.
        canvas: (height, width) in pixels of the picture that the windows cover together.
        size: (H, W) in pixels of the result.
        whole: (1, T, h, w) logits of the whole image, averaged with the canvas; or None.
        offset: (T,) subtracted from each class's probability; or None.

    Returns:
        (H, W) int32 labels in 0..T-1; the lower one where two classes score the same.

    Raises:
        TypeError, ValueError: a tensor does not fit, a window leaves the canvas, or the windows do not cover it.
    """
    counts = _check("label_map", logits, positions, window, canvas, size, whole, offset)
    best = torch.full(size, float("-inf"), dtype=logits.dtype, device=logits.device)
    labels = torch.zeros(size, dtype=torch.int32, device=logits.device)
    step = _chunk(logits, window, canvas)
    for classes in tiles(logits.shape[1], step):
        blended = _blend(logits, positions, window, canvas, whole, offset, counts, classes)
        for rows in tiles(size[0], max(1, CHUNK_ELEMENTS // (blended.shape[0] * size[1]))):
            score, label = _resize_rows(blended, size, rows).max(0)
            # As argmax has it: the first of equals, and NaN above everything.
            better = (score > best[rows]) | (score.isnan() & ~best[rows].isnan())
            best[rows] = torch.where(better, score, best[rows])
            labels[rows] = torch.where(better, label.int() + classes.start, labels[rows])
    return labels


def score_map(
    logits: Tensor,
    positions: Sequence[tuple[int, int]],
    *,
    window: tuple[int, int],
    canvas: tuple[int, int],
    size: tuple[int, int],
    whole: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """The scores (T, H, W) that `label_map` takes the best of; same arguments and errors."""
    counts = _check("score_map", logits, positions, window, canvas, size, whole, offset)
    scores = []
    for classes in tiles(logits.shape[1], _chunk(logits, window, canvas)):
        blended = _blend(logits, positions, window, canvas, whole, offset, counts, classes)
        scores.append(_resize_rows(blended, size, slice(0, size[0])))
    return torch.cat(scores)


def _check(
    operator: str,
    logits: Tensor,
    positions: Sequence[tuple[int, int]],
    window: tuple[int, int],
    canvas: tuple[int, int],
    size: tuple[int, int],
    whole: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """Check the arguments; returns how many windows cover each pixel of the canvas."""
    optional = {}
    if whole is not None:
        optional["whole"] = (whole, "1 T h w")
    if offset is not None:
        optional["offset"] = (offset, "T")
    check_tensors(operator, logits=(logits, "N T h w"), **optional)
    check_positive(operator, N=logits.shape[0], T=logits.shape[1], h=logits.shape[2], w=logits.shape[3])
    for name, (height, width) in (("window", window), ("canvas", canvas), ("size", size)):
        check_positive(operator, **{f"{name} height": height, f"{name} width": width})
    if len(positions) != logits.shape[0]:
        raise ValueError(
            f"{operator}: positions must name {logits.shape[0]} windows, one a logit map, got {len(positions)}."
        )
    counts = torch.zeros(canvas, dtype=logits.dtype, device=logits.device)
    for top, left in positions:
        if top < 0 or left < 0 or top + window[0] > canvas[0] or left + window[1] > canvas[1]:
            raise ValueError(
                f"{operator}: positions must keep the {window} window on the {canvas} canvas, got ({top}, {left})."
            )
        counts[top : top + window[0], left : left + window[1]] += 1
    if not counts.all():
        raise ValueError(f"{operator}: positions must cover the whole {canvas} canvas, some pixels lie in no window.")
    return counts


def _chunk(logits: Tensor, window: tuple[int, int], canvas: tuple[int, int]) -> int:
    area = logits.shape[0] * window[0] * window[1] + canvas[0] * canvas[1]
    return max(1, min(logits.shape[1], CHUNK_ELEMENTS // area))


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, T, h, w) -> (N, T, *size)."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def _blend(
    logits: Tensor,
    positions: Sequence[tuple[int, int]],
    window: tuple[int, int],
    canvas: tuple[int, int],
    whole: Tensor | None,
    offset: Tensor | None,
    counts: Tensor,
    classes: slice,
) -> Tensor:
    """(t, *canvas) scores of some classes before the last resizing."""
    scores = torch.sigmoid(_resize(logits[:, classes], window))
    if offset is not None:
        scores = scores - offset[classes, None, None]
    total = scores.new_zeros(scores.shape[1], *canvas)
    for (top, left), part in zip(positions, scores, strict=True):
        total[:, top : top + window[0], left : left + window[1]] += part
    blended = total / counts
    if whole is not None:
        blended = (blended + _resize(torch.sigmoid(_resize(whole[:, classes], window)), canvas)[0]) / 2
    return blended


def _resize_rows(maps: Tensor, size: tuple[int, int], rows: slice) -> Tensor:
    """Rows of the (T, H, W) bilinear resizing of maps (T, h, w)."""
    if (rows.start, rows.stop) == (0, size[0]):
        return _resize(maps.unsqueeze(0), size)[0]
    height = maps.shape[1]
    if height == size[0]:
        return _resize(maps[:, rows].unsqueeze(0), (rows.stop - rows.start, size[1]))[0]
    # Interpolate vertically by hand, with source rows in at least float32 as PyTorch has them, then horizontally.
    precision = torch.promote_types(maps.dtype, torch.float32)
    row = torch.arange(rows.start, rows.stop, dtype=precision, device=maps.device)
    source = ((row + 0.5) * (height / size[0]) - 0.5).clamp(min=0)
    above = source.long().clamp(max=height - 1)
    below = (above + 1).clamp(max=height - 1)
    weight = (source - above).unsqueeze(1).to(maps.dtype)
    mixed = torch.lerp(maps[:, above], maps[:, below], weight)
    return _resize(mixed.unsqueeze(0), (len(row), size[1]))[0]
