"""Label map: from low-resolution logits of one image's windows to one label for each pixel.

    p_n    = sigmoid(resize(logits_n, window)) − offset              every window
    canvas = Σ_n p_n at its position / number of windows there
    canvas = ½ (canvas + resize(sigmoid(resize(whole, window)), canvas))     if logits of the whole image are given
    scores = resize(canvas, size),   labels = argmax_t scores

All resizing is bilinear, corners not aligned. Exact rewrite: scores are computed for a few classes and rows at a time,
and only the best scores and labels of each pixel are kept, so memory does not grow with the number of classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..arguments import check_whole
from .common import registration
from .common.checks import check_positive, check_tensors
from .common.tiles import tiles

CHUNK_ELEMENTS = 2**22  # scores computed at a time: 16 MB in float32
MOST_LABELS = 8  # that `top_labels` gives: kernels keep them in registers
MOST_WINDOWS = 64  # whose positions a launch of the CUDA C++ kernels carries


class Placement(NamedTuple):
    """Where the windows of an image lie, in pixels."""

    positions: Sequence[tuple[int, int]]  # (top, left) of each of the N windows on the canvas
    window: tuple[int, int]  # (height, width) of every window
    canvas: tuple[int, int]  # (height, width) of the picture that the windows cover together
    size: tuple[int, int]  # (H, W) of the result, to which the canvas is resized

    def check(self, operator: str, windows: int) -> None:
        """Raise ValueError unless these are that many windows, which lie on the canvas and cover it."""
        positions, window, canvas, size = self
        for name, (height, width) in (("window", window), ("canvas", canvas), ("size", size)):
            check_positive(operator, **{f"{name} height": height, f"{name} width": width})
        if len(positions) != windows:
            raise ValueError(f"{operator}: positions must name {windows} windows, one per map, got {len(positions)}.")
        for top, left in positions:
            if min(top, left) < 0 or top + window[0] > canvas[0] or left + window[1] > canvas[1]:
                raise ValueError(
                    f"{operator}: positions must keep the {window} window on the {canvas} canvas, got ({top}, {left})."
                )
        if not self._cover():
            raise ValueError(f"{operator}: positions must cover the whole {canvas} canvas, got pixels in no window.")

    def _cover(self) -> bool:
        """Whether every pixel lies in a window. The first one of a row or column that does not is at its beginning or
        where a window has just ended: only these are checked."""
        positions, (height, width), canvas, _ = self
        for row in {0, *(top + height for top, _ in positions if top + height < canvas[0])}:
            lefts = {left for top, left in positions if top <= row < top + height}
            for column in {0, *(left + width for left in lefts if left + width < canvas[1])}:
                if not any(left <= column < left + width for left in lefts):
                    return False
        return True


@torch.no_grad()
def label_map(
    logits: Tensor, placement: Placement, *, whole: Tensor | None = None, offset: Tensor | None = None
) -> Tensor:
    """The best class of every pixel (CAT-Seg, section 4 and its supplement; Cascade-CLIP, section 4.1).

    Args:
        logits: (N, T, h, w), one map for each window.
        placement: where the windows lie, and the size (H, W) of the result.
        whole: (1, T, h, w) logits of the whole image, averaged with the canvas; or None.
        offset: (T,) subtracted from each class's probability; or None.

    Returns:
        (H, W) int32 labels in 0..T-1; the lower one where two classes score the same.

    Raises:
        TypeError, ValueError: a tensor does not fit, a window leaves the canvas, or the windows do not cover it.
    """
    return _run("label_map", logits, placement, whole, offset, 1)[1][0]


@torch.no_grad()
def top_labels(
    logits: Tensor, placement: Placement, *, k: int, whole: Tensor | None = None, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best k classes of every pixel and their scores.

    Args:
        logits, placement, whole, offset: as `label_map` takes them.
        k: how many, 1..min(T, 8).

    Returns:
        scores (k, H, W) of the logits' dtype, the best first and NaN before all, without gradient, and their labels
        (k, H, W), int32; the lower label first where two classes score the same.

    Raises:
        TypeError, ValueError: as `label_map`, or for another k.
    """
    return _run("top_labels", logits, placement, whole, offset, k)


def score_map(
    logits: Tensor, placement: Placement, *, whole: Tensor | None = None, offset: Tensor | None = None
) -> Tensor:
    """The scores (T, H, W) that `label_map` takes the best of; same arguments and errors."""
    return _run("score_map", logits, placement, whole, offset, None)[0]


def _run(
    function: str, logits: Tensor, placement: Placement, whole: Tensor | None, offset: Tensor | None, k: int | None
) -> tuple[Tensor, Tensor]:
    """Check the arguments of a public function, then run `torch_form` or its kernels; k is None for all scores."""
    optional = {"whole": (whole, "1 T h w"), "offset": (offset, "T")}
    given = {name: (tensor, shape) for name, (tensor, shape) in optional.items() if tensor is not None}
    check_tensors(function, logits=(logits, "N T h w"), **given)
    windows, classes, height, width = logits.shape
    check_positive(function, N=windows, T=classes, h=height, w=width)
    if not isinstance(placement, Placement):
        raise TypeError(f"{function}: placement must be an ovseg_fast.ops.Placement, got {type(placement).__name__}.")
    placement.check(function, windows)
    most = min(classes, MOST_LABELS)
    if k is not None:
        check_whole(f"{function}: k", k)
    if k is not None and not 1 <= k <= most:
        raise ValueError(f"{function}: k must be in 1..min(T, {MOST_LABELS}) = {most}, got {k}.")
    whole, offset = (None if tensor is None else tensor.to(logits.dtype) for tensor in (whole, offset))
    differentiable = any(tensor is not None and tensor.requires_grad for tensor in (logits, whole, offset))
    no_gradient = "its kernel has no gradient" if differentiable and torch.is_grad_enabled() else None
    too_many = f"its kernels take up to {MOST_WINDOWS} windows, not {windows}" if windows > MOST_WINDOWS else None
    backend = backends.choose("label_map", logits, refusals={"triton": no_gradient, "cuda": no_gradient or too_many})
    if backend == "torch":
        return torch_form(logits, placement, whole, offset, k or 0)
    positions = [start for position in placement.positions for start in position]
    sizes = [*placement.window, *placement.canvas, *placement.size]
    return torch.ops.ovseg_fast.label_map(
        logits, whole, offset, positions, sizes, k or 0, function != "label_map", backend
    )


def torch_form(
    logits: Tensor, placement: Placement, whole: Tensor | None, offset: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """Scores and labels of the best k classes (k, H, W); with k = 0 the scores of all (T, H, W), and no labels."""
    size, canvases = placement.size, _canvases(logits, placement, whole, offset)
    labels = torch.zeros((k, *size), dtype=torch.int32, device=logits.device)
    if k == 0:
        return torch.cat([_resize_rows(canvas, size, slice(0, size[0])) for _, canvas in canvases]), labels
    best = logits.new_full((k, *size), float("-inf"))
    for start, canvas in canvases:
        for rows in tiles(size[0], max(1, CHUNK_ELEMENTS // (canvas.shape[0] * size[1]))):
            _keep_best(best[:, rows], labels[:, rows], _resize_rows(canvas, size, rows), start)
    return best, labels


def _keep_best(best: Tensor, labels: Tensor, scores: Tensor, start: int) -> None:
    """Merge scores (t, r, W) of classes from `start` on into the best (k, r, W) of those before them: as argmax does,
    the first of equals, and NaN above everything."""
    if len(best) == 1:
        score, label = scores.max(0, keepdim=True)
        better = (score > best) | (score.isnan() & ~best.isnan())
        best.copy_(torch.where(better, score, best))
        labels.copy_(torch.where(better, label.int() + start, labels))
        return
    found, kept = (min(count, len(best)) for count in (start, start + len(scores)))
    classes = torch.arange(start, start + len(scores), dtype=torch.int32, device=scores.device)
    names = torch.cat([labels[:found], classes[:, None, None].expand_as(scores)])
    ordered, order = torch.cat([best[:found], scores]).sort(dim=0, descending=True, stable=True)
    best[:kept] = ordered[:kept]
    labels[:kept] = names.gather(0, order[:kept])


def _canvases(
    logits: Tensor, placement: Placement, whole: Tensor | None, offset: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """For a few classes at a time: the first of them, and their scores (t, *canvas) before the last resizing."""
    positions, (height, width), canvas, _ = placement
    counts = logits.new_zeros(canvas)  # windows that cover each pixel
    for top, left in positions:
        counts[top : top + height, left : left + width] += 1
    area = len(positions) * height * width + canvas[0] * canvas[1]
    for classes in tiles(logits.shape[1], max(1, CHUNK_ELEMENTS // area)):
        scores = torch.sigmoid(_resize(logits[:, classes], placement.window))
        if offset is not None:
            scores = scores - offset[classes, None, None]
        total = scores.new_zeros(scores.shape[1], *canvas)
        for (top, left), part in zip(positions, scores, strict=True):
            total[:, top : top + height, left : left + width] += part
        mean = total / counts
        if whole is not None:
            mean = (mean + _resize(torch.sigmoid(_resize(whole[:, classes], placement.window)), canvas)[0]) / 2
        yield classes.start, mean


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, T, h, w) -> (N, T, *size)."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def _resize_rows(maps: Tensor, size: tuple[int, int], rows: slice) -> Tensor:
    """Rows of the (T, H, W) bilinear resizing of maps (T, h, w)."""
    if (rows.start, rows.stop) == (0, size[0]):
        return _resize(maps.unsqueeze(0), size)[0]
    if (height := maps.shape[1]) == size[0]:
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


# Kernels: `positions` is (top, left, top, left, ...), `sizes` those of the window, the canvas and the result.
registration.define(
    "label_map(Tensor logits, Tensor? whole, Tensor? offset, SymInt[] positions, SymInt[] sizes, SymInt k, "
    "bool need_scores) -> (Tensor, Tensor)",
    "label_map",
    lambda logits, whole, offset, positions, sizes, k, need_scores: (
        logits.new_empty((k or logits.shape[1], *sizes[4:]) if need_scores else 0),
        logits.new_empty((k, *sizes[4:]), dtype=torch.int32),
    ),
    differentiable=False,
)
