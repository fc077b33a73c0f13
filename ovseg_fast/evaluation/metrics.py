"""A confusion matrix M, rows the ground truth and columns the prediction, and the scores that follow from it:

IoU(c) = M[c, c] / (sum of row c + sum of column c - M[c, c]),   accuracy(c) = M[c, c] / sum of row c.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..compat import ensure_importable
from ..data.masks import NO_CLASS

CHUNK = 2**24  # pixels counted at once; their int64 temporaries take some 500 MB


class ConfusionMatrix:
    """Counts pixels of T `classes` in `matrix`, (T, T) int64 on `device`. Raises ValueError for less than one class."""

    def __init__(self, classes: int, device: str | torch.device = "cpu") -> None:
        if classes < 1:
            raise ValueError(f"classes must be at least 1, got {classes}.")
        self.classes = classes
        self.matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def update(self, predicted: Tensor | ArrayLike, truth: Tensor | ArrayLike) -> None:
        """Add an image, or a batch of them.

        Args:
            predicted: integers in 0..T-1, of any shape; any value where `truth` is -1.
            truth: integers in -1..T-1 of the same shape; -1 is not counted.

        Raises:
            TypeError: not integers. ValueError: other shapes, or labels outside these ranges. Nothing is added then.
        """
        ensure_importable()  # torchmetrics imports torchvision
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        device = self.matrix.device
        predicted, truth = (torch.as_tensor(labels, device=device) for labels in (predicted, truth))
        for name, labels in (("predicted", predicted), ("truth", truth)):
            if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
                raise TypeError(f"{name} must hold integers, got {labels.dtype}.")
        if predicted.shape != truth.shape:
            shapes = f"{tuple(predicted.shape)} and {tuple(truth.shape)}"
            raise ValueError(f"predicted and truth must have the same shape, got {shapes}.")
        counted = truth != NO_CLASS
        predicted, known = predicted[counted], truth[counted]
        for name, labels, lowest in (("truth", known, NO_CLASS), ("predicted", predicted, 0)):
            low, high = torch.stack(labels.aminmax()).tolist() if labels.numel() else (0, 0)
            if low < 0 or high >= self.classes:
                raise ValueError(f"{name} must hold labels in {lowest}..{self.classes - 1}, got {low}..{high}.")
        added = torch.zeros_like(self.matrix)
        with _plain_counting():
            for part, part_truth in zip(predicted.split(CHUNK), known.split(CHUNK), strict=True):
                added += multiclass_confusion_matrix(part, part_truth, self.classes, validate_args=False)
        self.matrix += added

    def scores(self, seen: Sequence[int] | None = None) -> Scores:
        """The scores of everything added so far. `seen`: indices of the classes that were trained on."""
        return Scores.of(self.matrix.cpu().numpy(), seen)


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of a confusion matrix. All ratios are in 0..1; NaN if no class qualifies. The means are
    over the classes in the ground truth.

    Attributes:
        correct, truth, predicted: (T,) int64, pixels of each class, among those with a ground truth.
        seen: (T,) bool, the classes that were trained on, or None without such a split.
    """

    correct: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    seen: np.ndarray | None = None

    @classmethod
    def of(cls, matrix: ArrayLike, seen: Sequence[int] | None = None) -> Scores:
        """Scores of a (T, T) integer matrix, rows the ground truth; `seen` are indices. Raises ValueError if the matrix
        is not square, or an index is outside 0..T-1."""
        counts = np.asarray(matrix)
        if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
            raise ValueError(f"matrix must be of shape (T, T), got {counts.shape}.")
        flags = None
        if seen is not None:
            if not set(seen) <= set(range(len(counts))):
                raise ValueError(f"seen must hold indices in 0..{len(counts) - 1}, got {list(seen)}.")
            flags = np.isin(np.arange(len(counts)), np.asarray(seen, dtype=np.int64))
        return cls(counts.diagonal().copy(), counts.sum(1), counts.sum(0), flags)

    @property
    def iou(self) -> np.ndarray:
        """(T,) float64; 0 for a class that is only predicted, NaN for one that is nowhere."""
        return _ratio(self.correct, self.truth + self.predicted - self.correct)

    @property
    def accuracy(self) -> np.ndarray:
        """(T,) float64: share of a class's pixels that are labelled correctly; NaN without ground truth."""
        return _ratio(self.correct, self.truth)

    @property
    def present(self) -> np.ndarray:
        """(T,) bool: the classes in the ground truth. Only they count in the means."""
        return self.truth > 0

    @property
    def miou(self) -> float:
        """Mean IoU over the classes in the ground truth (as detectron2 and CAT-Seg's published numbers)."""
        return _mean(self.iou[self.present])

    @property
    def miou_nonzero_union(self) -> float:
        """Mean IoU over the classes in the ground truth or predicted (as mmsegmentation and Cascade-CLIP's)."""
        return _mean(self.iou[self.truth + self.predicted > 0])

    @property
    def pixel_accuracy(self) -> float:
        """Share of all counted pixels that are labelled correctly."""
        pixels = self.truth.sum()
        return float(self.correct.sum() / pixels) if pixels else float("nan")

    @property
    def mean_accuracy(self) -> float:
        """Mean of `accuracy`."""
        return _mean(self.accuracy[self.present])

    @property
    def miou_seen(self) -> float:
        """Mean IoU over the classes that were trained on; NaN without a split."""
        return _mean(self.iou[self.present & self.seen]) if self.seen is not None else float("nan")

    @property
    def miou_unseen(self) -> float:
        """Mean IoU over the classes that were not trained on; NaN without a split."""
        return _mean(self.iou[self.present & ~self.seen]) if self.seen is not None else float("nan")

    @property
    def hiou(self) -> float:
        """Harmonic mean of `miou_seen` and `miou_unseen`; NaN where either is."""
        seen, unseen = self.miou_seen, self.miou_unseen
        return 0.0 if seen + unseen == 0 else 2 * seen * unseen / (seen + unseen)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


@contextmanager
def _plain_counting() -> Iterator[None]:
    """Counting integers is deterministic in any order, but in deterministic mode torchmetrics compares each pixel with
    each cell of the matrix, which takes too much memory."""
    strict, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn)
