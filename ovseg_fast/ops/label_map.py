"""Label map: from low-resolution logits of one image's windows to one label a pixel.

    p_n    = sigmoid(resize(logits_n, window)) − offset              every window
    canvas = Σ_n p_n at its position / number of windows there
    canvas = ½ (canvas + resize(sigmoid(resize(whole, window)), canvas))     where a map of the whole image is given
    scores = resize(canvas, size),   labels = argmax_t scores

All resizing is bilinear, corners not aligned. Exact rewrite: a few classes and rows are worked out at a time while
only the best scores and labels of each pixel are kept, so memory does not grow with the number of classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .common import legacy
from .common.checks import check_positive, check_tensors
from .common.tiles import tiles

CHUNK_ELEMENTS = 2**22  # scores worked on at a time: 16 MB in float32
MOST_LABELS = 8  # that `top_labels` gives: kernels keep them in registers
MOST_WINDOWS = 64  # whose positions a launch of the CUDA C++ kernels carries


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
    logits, whole, offset = _check("label_map", logits, positions, window, canvas, size, whole, offset, False)
    backend = backends.choose("label_map", logits, refusals=_too_many(positions))
    if backend != "torch":
        flat = [start for position in positions for start in position]
        return torch.ops.ovseg_fast.top_labels(logits, whole, offset, flat, window, canvas, size, 1, False, backend)[1][
            0
        ]
    best = torch.full(size, float("-inf"), dtype=logits.dtype, device=logits.device)
    labels = torch.zeros(size, dtype=torch.int32, device=logits.device)
    for classes, rows, scores in _tiles(logits, positions, window, canvas, size, whole, offset):
        score, label = scores.max(0)
        # As argmax has it: the first of equals, and NaN above everything.
        better = (score > best[rows]) | (score.isnan() & ~best[rows].isnan())
        best[rows] = torch.where(better, score, best[rows])
        labels[rows] = torch.where(better, label.int() + classes.start, labels[rows])
    return labels


def top_labels(
    logits: Tensor,
    positions: Sequence[tuple[int, int]],
    *,
    k: int,
    window: tuple[int, int],
    canvas: tuple[int, int],
    size: tuple[int, int],
    whole: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The best k classes of every pixel and their scores; the other arguments as `label_map` takes them.

    Args:
        k: how many, 1..min(T, 8).

    Returns:
        scores (k, H, W) of the logits' dtype, the best first and NaN before all, without gradient, and their labels
        (k, H, W), int32; the lower label first where two classes score the same.

    Raises:
        TypeError, ValueError: as `label_map`, or for another k.
    """
    logits, whole, offset = _check("top_labels", logits, positions, window, canvas, size, whole, offset, False)
    most = min(logits.shape[1], MOST_LABELS)
    if not 1 <= k <= most:
        raise ValueError(f"top_labels: k must be in 1..min(T, {MOST_LABELS}) = {most}, got {k}.")
    backend = backends.choose("label_map", logits, refusals=_too_many(positions))
    if backend != "torch":
        flat = [start for position in positions for start in position]
        return torch.ops.ovseg_fast.top_labels(logits, whole, offset, flat, window, canvas, size, k, True, backend)
    best = logits.new_empty(k, *size)
    labels = torch.empty_like(best, dtype=torch.int32)
    for classes, rows, scores in _tiles(logits, positions, window, canvas, size, whole, offset):
        found = min(classes.start, k)
        keep = min(classes.stop, k)
        new = torch.arange(classes.start, classes.stop, dtype=torch.int32, device=logits.device)
        names = torch.cat([labels[:found, rows], new[:, None, None].expand_as(scores)])
        # A stable sort keeps the lower of equal classes in front, and takes NaN to be above everything.
        ordered, order = torch.cat([best[:found, rows], scores]).sort(dim=0, descending=True, stable=True)
        best[:keep, rows] = ordered[:keep]
        labels[:keep, rows] = names.gather(0, order[:keep])
    return best, labels


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
    logits, whole, offset = _check("score_map", logits, positions, window, canvas, size, whole, offset, True)
    no_gradient = _no_gradient(logits, whole, offset)
    refusals = {"triton": no_gradient, "cuda": no_gradient or _too_many(positions)["cuda"]}
    backend = backends.choose("label_map", logits, refusals=refusals)
    if backend != "torch":
        flat = [start for position in positions for start in position]
        return torch.ops.ovseg_fast.score_map(logits, whole, offset, flat, window, canvas, size, backend)
    counts = _counts(logits, positions, window, canvas)
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
    differentiable: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Check the arguments, on the host; returns the tensors, of one dtype, detached unless `differentiable`."""
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
    for top, left in positions:
        if top < 0 or left < 0 or top + window[0] > canvas[0] or left + window[1] > canvas[1]:
            raise ValueError(
                f"{operator}: positions must keep the {window} window on the {canvas} canvas, got ({top}, {left})."
            )
    if not _cover(positions, window, canvas):
        raise ValueError(f"{operator}: positions must cover the whole {canvas} canvas, some pixels lie in no window.")
    whole, offset = (None if tensor is None else tensor.to(logits.dtype) for tensor in (whole, offset))
    if differentiable:
        return logits, whole, offset
    return logits.detach(), None if whole is None else whole.detach(), None if offset is None else offset.detach()


def _cover(positions: Sequence[tuple[int, int]], window: tuple[int, int], canvas: tuple[int, int]) -> bool:
    """Whether every pixel lies in a window. Where one does not, neither does the one above it in the first row or in a
    row where a window has just ended, so only these rows are looked at."""
    for row in {0, *(top + window[0] for top, _ in positions)}:
        lefts = [left for top, left in positions if top <= row < top + window[0]]
        reach = 0
        while row < canvas[0] and reach < canvas[1]:
            further = max([0, *(left + window[1] for left in lefts if left <= reach)])
            if further <= reach:
                return False
            reach = further
    return True


def _no_gradient(*inputs: Tensor | None) -> str | None:
    """Why kernels cannot run where gradients are wanted."""
    wanted = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    return "its kernel has no gradient" if wanted else None


def _too_many(positions: Sequence[tuple[int, int]]) -> dict[str, str | None]:
    """Why the CUDA C++ kernels cannot take so many windows."""
    count = len(positions)
    return {"cuda": f"its kernels take up to {MOST_WINDOWS} windows, not {count}" if count > MOST_WINDOWS else None}


def _tiles(
    logits: Tensor,
    positions: Sequence[tuple[int, int]],
    window: tuple[int, int],
    canvas: tuple[int, int],
    size: tuple[int, int],
    whole: Tensor | None,
    offset: Tensor | None,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(classes, rows, scores (t, r, W)) in the order of the classes."""
    counts = _counts(logits, positions, window, canvas)
    for classes in tiles(logits.shape[1], _chunk(logits, window, canvas)):
        blended = _blend(logits, positions, window, canvas, whole, offset, counts, classes)
        for rows in tiles(size[0], max(1, CHUNK_ELEMENTS // (blended.shape[0] * size[1]))):
            yield classes, rows, _resize_rows(blended, size, rows)


def _counts(
    logits: Tensor, positions: Sequence[tuple[int, int]], window: tuple[int, int], canvas: tuple[int, int]
) -> Tensor:
    """How many windows cover each pixel of the canvas."""
    counts = logits.new_zeros(canvas)
    for top, left in positions:
        counts[top : top + window[0], left : left + window[1]] += 1
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


# --- kernels: positions as one list (top, left, top, left, ...) ---


def _top_labels_fake(
    logits: Tensor,
    whole: Tensor | None,
    offset: Tensor | None,
    positions: Sequence[int],
    window: Sequence[int],
    canvas: Sequence[int],
    size: Sequence[int],
    k: int,
    need_scores: bool,
) -> tuple[Tensor, Tensor]:
    labels = logits.new_empty((k, *size), dtype=torch.int32)
    return logits.new_empty(labels.shape if need_scores else 0), labels


def _score_map_fake(
    logits: Tensor,
    whole: Tensor | None,
    offset: Tensor | None,
    positions: Sequence[int],
    window: Sequence[int],
    canvas: Sequence[int],
    size: Sequence[int],
) -> Tensor:
    return logits.new_empty(logits.shape[1], *size)


_ARGUMENTS = (
    "Tensor logits, Tensor? whole, Tensor? offset, SymInt[] positions, SymInt[] window, SymInt[] canvas, SymInt[] size"
)
legacy.define(
    f"top_labels({_ARGUMENTS}, SymInt k, bool need_scores, str backend) -> (Tensor, Tensor)",
    "label_map",
    _top_labels_fake,
)
legacy.define(f"score_map({_ARGUMENTS}, str backend) -> Tensor", "label_map", _score_map_fake)
