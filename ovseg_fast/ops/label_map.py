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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..arguments import check_whole
from .common import registration
from .common.checks import check_positive, check_tensors
from .common.threads import run_pieces, threads_for
from .common.tiles import tiles

CHUNK_ELEMENTS = 2**22  # scores computed at a time: 16 MB in float32
LEAST_GROUPS = 8  # of classes, to be shared out among threads: even where one is slower
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


class KeptLogits(NamedTuple):
    """Logits of the K classes that each map kept of T; all others have the logit `dropped`."""

    logits: Tensor  # (N, K, h, w)
    classes: Tensor  # (N, K) int64: which they are, without repetition, in 0..total-1
    total: int  # T
    dropped: float

    def dense(self) -> Tensor:
        """(N, T, h, w) logits of all classes."""
        maps = torch.arange(len(self.logits), device=self.logits.device).unsqueeze(1)
        full = self.logits.new_full((len(self.logits), self.total, *self.logits.shape[-2:]), self.dropped)
        return full.index_put((maps, self.classes), self.logits)

    def slots(self) -> Tensor:
        """(N, T) int32: which of a map's logits are a class's; −1 for one that it did not keep."""
        slots = torch.full((len(self.classes), self.total), -1, dtype=torch.int32, device=self.classes.device)
        numbers = torch.arange(self.classes.shape[1], dtype=torch.int32, device=self.classes.device)
        return slots.scatter_(1, self.classes, numbers.expand(self.classes.shape))


@torch.no_grad()
def label_map(
    logits: Tensor | KeptLogits,
    placement: Placement,
    *,
    whole: Tensor | KeptLogits | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """The best class of every pixel (CAT-Seg, section 4 and its supplement; Cascade-CLIP, section 4.1).

    Args:
        logits: (N, T, h, w), one map for each window; or `KeptLogits`: classes that no window kept cost nothing.
        placement: where the windows lie, and the size (H, W) of the result.
        whole: (1, T, h, w) logits of the whole image, averaged with the canvas, or None; `KeptLogits` if `logits` are.
        offset: (T,) subtracted from each class's probability; or None.

    Returns:
        (H, W) int32 labels in 0..T-1; the lower one where two classes score the same.

    Raises:
        TypeError, ValueError: a tensor does not fit, a window leaves the canvas, or the windows do not cover it.
    """
    return _run("label_map", logits, placement, whole, offset, 1)[1][0]


@torch.no_grad()
def top_labels(
    logits: Tensor | KeptLogits,
    placement: Placement,
    *,
    k: int,
    whole: Tensor | KeptLogits | None = None,
    offset: Tensor | None = None,
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
    logits: Tensor | KeptLogits,
    placement: Placement,
    *,
    whole: Tensor | KeptLogits | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """The scores (T, H, W) that `label_map` takes the best of; same arguments and errors."""
    return _run("score_map", logits, placement, whole, offset, None)[0]


def _run(
    function: str,
    logits: Tensor | KeptLogits,
    placement: Placement,
    whole: Tensor | KeptLogits | None,
    offset: Tensor | None,
    k: int | None,
) -> tuple[Tensor, Tensor]:
    """Check the arguments of a public function, then run `torch_form` or its kernels; k is None for all scores."""
    if isinstance(logits, KeptLogits) or isinstance(whole, KeptLogits):
        return _run_kept(function, logits, placement, whole, offset, k)
    optional = {"whole": (whole, "1 T h w"), "offset": (offset, "T")}
    given = {name: (tensor, shape) for name, (tensor, shape) in optional.items() if tensor is not None}
    check_tensors(function, logits=(logits, "N T h w"), **given)
    windows, classes, height, width = logits.shape
    check_positive(function, N=windows, T=classes, h=height, w=width)
    _check_placement(function, placement, windows)
    _check_k(function, k, classes)
    whole, offset = (None if tensor is None else tensor.to(logits.dtype) for tensor in (whole, offset))
    backend = _choose(logits, whole, offset)
    if backend == "torch":
        return torch_form(logits, placement, whole, offset, k or 0)
    return torch.ops.ovseg_fast.label_map(
        logits, whole, offset, *_numbers(placement), k or 0, function != "label_map", backend
    )


def _check_placement(function: str, placement: Placement, windows: int) -> None:
    if not isinstance(placement, Placement):
        raise TypeError(f"{function}: placement must be an ovseg_fast.ops.Placement, got {type(placement).__name__}.")
    placement.check(function, windows)


def _check_k(function: str, k: int | None, classes: int) -> None:
    most = min(classes, MOST_LABELS)
    if k is not None:
        check_whole(f"{function}: k", k)
    if k is not None and not 1 <= k <= most:
        raise ValueError(f"{function}: k must be in 1..min(T, {MOST_LABELS}) = {most}, got {k}.")


def _choose(logits: Tensor, whole: Tensor | None, offset: Tensor | None) -> str:
    """The backend."""
    differentiable = any(tensor is not None and tensor.requires_grad for tensor in (logits, whole, offset))
    no_gradient = "its kernel has no gradient" if differentiable and torch.is_grad_enabled() else None
    windows = len(logits)
    too_many = f"its kernels take up to {MOST_WINDOWS} windows, not {windows}" if windows > MOST_WINDOWS else None
    refusals = {"triton": no_gradient, "cuda": no_gradient or too_many, "cpu": no_gradient}
    return backends.choose("label_map", logits, refusals=refusals)


def _numbers(placement: Placement) -> tuple[list[int], list[int]]:
    """Positions and sizes as kernels take them."""
    positions = [start for position in placement.positions for start in position]
    return positions, [*placement.window, *placement.canvas, *placement.size]


# --- classes that no window kept ---


def _run_kept(
    function: str, logits: Any, placement: Placement, whole: Any, offset: Tensor | None, k: int | None
) -> tuple[Tensor, Tensor]:
    """`_run` of the classes that some map kept, and of those of the others that may be among the best k."""
    parts = _check_kept(function, logits, whole, offset)
    total, dropped = logits.total, logits.dropped
    _check_placement(function, placement, len(logits.logits))
    _check_k(function, k, total)
    offset = None if offset is None else offset.to(logits.logits.dtype)
    names = _candidates(parts, offset, k)
    position = names.new_zeros(total)
    position[names] = torch.arange(len(names), device=names.device)
    parts = [part._replace(classes=position[part.classes], total=len(names)) for part in parts]
    offset = None if offset is None else offset[names]
    maps = parts[0].logits, parts[1].logits if len(parts) > 1 else None
    if _choose(*maps, offset) == "cpu":
        slots = torch.cat([part.slots() for part in parts])
        scores, labels = torch.ops.ovseg_fast.label_map_kept(
            *maps, offset, slots, dropped, *_numbers(placement), k or 0, function != "label_map", "cpu"
        )
    else:
        dense = parts[0].dense(), parts[1].dense() if len(parts) > 1 else None
        scores, labels = _run(function, dense[0], placement, dense[1], offset, k)
    return scores, names.int()[labels.long()]


def _check_kept(function: str, logits: Any, whole: Any, offset: Tensor | None) -> list[KeptLogits]:
    """The logits of the windows and of the whole image, if it is given, once they are known to fit together."""
    for name, part in (("logits", logits), ("whole", whole)):
        if part is not None and not isinstance(part, KeptLogits):
            raise TypeError(f"{function}: {name} must be KeptLogits like the other maps, got {type(part).__name__}.")
    tensors = {"logits": (logits.logits, "N K h w"), "classes of logits": (logits.classes, "N K")}
    if whole is not None:
        tensors |= {"whole": (whole.logits, "1 K h w"), "classes of whole": (whole.classes, "1 K")}
        if (whole.total, whole.dropped) != (logits.total, logits.dropped):
            expected, got = ((part.total, part.dropped) for part in (logits, whole))
            raise ValueError(f"{function}: whole must have the total and dropped of logits, {expected}, got {got}.")
    if offset is not None:
        tensors["offset"] = (offset, "T")
    check_tensors(function, ("classes of logits", "classes of whole"), **tensors)
    if offset is not None and len(offset) != logits.total:
        raise ValueError(
            f"{function}: offset must have one number for each of {logits.total} classes, got {len(offset)}."
        )
    windows, kept, height, width = logits.logits.shape
    check_positive(function, N=windows, K=kept, h=height, w=width)
    parts = [part for part in (logits, whole) if part is not None]
    for part in parts:
        if not 0 <= int(part.classes.min()) <= int(part.classes.max()) < part.total:
            limits = int(part.classes.min()), int(part.classes.max())
            raise ValueError(f"{function}: classes must be in 0..{part.total - 1}, got {limits[0]}..{limits[1]}.")
    dtype = logits.logits.dtype
    return [part._replace(logits=part.logits.to(dtype), classes=part.classes.long()) for part in parts]


def _candidates(parts: list[KeptLogits], offset: Tensor | None, k: int | None) -> Tensor:
    """Classes that may be among the best k of a pixel, in ascending order; all for k = None.

    Where no window kept them, all others have the same score, less the offset: the first k of them suffice.
    """
    total, device = parts[0].total, parts[0].classes.device
    if k is None:
        return torch.arange(total, device=device)
    wanted = torch.zeros(total, dtype=torch.bool, device=device)
    for part in parts:
        wanted[part.classes.flatten()] = True
    others = (~wanted).nonzero().flatten()
    if offset is not None:
        others = others[(-offset[others]).sort(descending=True, stable=True).indices]  # NaN first
    wanted[others[:k]] = True
    return wanted.nonzero().flatten()


def torch_form(
    logits: Tensor, placement: Placement, whole: Tensor | None, offset: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """Scores and labels of the best k classes (k, H, W); with k = 0 the scores of all (T, H, W), and no labels."""
    classes, step = logits.shape[1], _classes_at_a_time(placement)
    threads = threads_for(*(tensor for tensor in (logits, whole, offset) if tensor is not None))
    # Each thread takes some of the classes, and what it found best of them is compared at the end. A part is a multiple
    # of `step`, so that the same tensors are computed whatever the number of threads, and the same bits.
    groups = max(threads, LEAST_GROUPS) if threads > 1 else 1
    parts = [*tiles(classes, -(-classes // (groups * step)) * step)]

    def run(part: slice) -> tuple[Tensor, Tensor]:
        own = (None if whole is None else whole[:, part], None if offset is None else offset[part])
        return _best_of(logits[:, part], placement, *own, k)

    found = run_pieces(run, parts, threads)
    if len(found) == 1:
        return found[0]
    scores = torch.cat([part[0] for part in found])
    if k == 0:
        return scores, found[0][1]
    labels = torch.cat([part[1] + group.start for part, group in zip(found, parts, strict=True)])
    if k == 1:
        best, order = scores.max(0, keepdim=True)
    else:
        best, order = (part[:k] for part in scores.sort(dim=0, descending=True, stable=True))
    return best, labels.gather(0, order)


def _best_of(
    logits: Tensor, placement: Placement, whole: Tensor | None, offset: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """Scores and labels of the best k classes, or of all if there are fewer; with k = 0 the scores of all."""
    size, canvases, k = placement.size, _canvases(logits, placement, whole, offset), min(k, logits.shape[1])
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
    for classes in tiles(logits.shape[1], _classes_at_a_time(placement)):
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


def _classes_at_a_time(placement: Placement) -> int:
    positions, window, canvas, _ = placement
    area = len(positions) * window[0] * window[1] + canvas[0] * canvas[1]
    return max(1, CHUNK_ELEMENTS // area)


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

# `slots` are KeptLogits.slots() of the windows' logits, then of the whole image's.
registration.define(
    "label_map_kept(Tensor logits, Tensor? whole, Tensor? offset, Tensor slots, float dropped, SymInt[] positions, "
    "SymInt[] sizes, SymInt k, bool need_scores) -> (Tensor, Tensor)",
    "label_map",
    lambda logits, whole, offset, slots, dropped, positions, sizes, k, need_scores: (
        logits.new_empty((k or slots.shape[1], *sizes[4:]) if need_scores else 0),
        logits.new_empty((k, *sizes[4:]), dtype=torch.int32),
    ),
    differentiable=False,
)
