"""The result of segmenting one image."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from . import visualize
from .arguments import check_number, check_whole
from .files import write_whole

NOT_KEPT = "this result keeps no scores; call segment with scores=True, and read .scores before you pickle it."


class Segmentation:
    """A class for every pixel of an image.

    Args:
        image: the photograph, H pixels high and W wide. classes: T names.
        labels: (H, W) integers in 0..T-1; the attribute `labels` is int32.
        compute_scores: returns the scores, (T, H, W) in 0..1; called at most once, at the first use of `scores`. None
            for a result that keeps none.
        compute_top: returns what `top` does; by default `top` sorts the scores.

    A copy computes what the original does. A pickled result holds only the scores that were computed before.

    Raises:
        ValueError, TypeError: labels that do not fit the image or the classes.
    """

    def __init__(
        self,
        image: Image.Image,
        classes: Sequence[str],
        labels: ArrayLike,
        compute_scores: Callable[[], ArrayLike] | None = None,
        compute_top: Callable[[int], tuple[np.ndarray, np.ndarray]] | None = None,
    ) -> None:
        self.image = image
        self.classes = list(classes)
        self.labels = visualize.check_label_map(labels, len(self.classes), image)
        self._compute_scores, self._compute_top = compute_scores, compute_top
        self._scores: np.ndarray | None = None
        self._lock = threading.Lock()  # threads that ask for the scores at once compute them once

    @property
    def scores(self) -> np.ndarray:
        """(T, H, W) float32 in 0..1: how well each class fits each pixel. Computed at first use, then kept.

        Raises RuntimeError for a result that does not keep them.
        """
        with self._lock:
            if self._scores is None:
                if self._compute_scores is None:
                    raise RuntimeError(NOT_KEPT)
                scores = np.asarray(self._compute_scores(), dtype=np.float32)
                expected = (len(self.classes), *self.labels.shape)
                if scores.shape != expected:
                    raise ValueError(f"compute_scores must return shape {expected} (T, H, W), got {scores.shape}.")
                self._scores, self._compute_scores = scores, None  # frees what it holds
            return self._scores

    def top(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best k classes of every pixel, computed at each call without holding all T maps.

        Returns:
            Labels (k, H, W) int32 and what they are ranked by, (k, H, W) float32, the best first: probabilities, less
            the offset of seen classes (for Cascade-CLIP `scores` is their softmax over all classes).

        Raises:
            TypeError: k is no whole number. ValueError: it is not in 1..min(T, 8). RuntimeError: the result does not
                keep what that needs.
        """
        check_whole("k", k)
        if self._compute_top is not None:
            return self._compute_top(k)
        if not 1 <= k <= len(self.classes):
            raise ValueError(f"k must be in 1..{len(self.classes)}, the number of classes, got {k}.")
        labels = np.argsort(-self.scores, axis=0, kind="stable")[:k]
        return labels.astype(np.int32), np.take_along_axis(self.scores, labels, 0)

    def counts(self) -> np.ndarray:
        """(T,) int64: pixels of each class."""
        return np.bincount(self.labels.ravel(), minlength=len(self.classes))

    def overlay(
        self, alpha: float = 0.5, legend: bool = True, font: str | os.PathLike[str] | None = None
    ) -> Image.Image:
        """See `visualize.overlay`."""
        return visualize.overlay(self.image, self.labels, self.classes, alpha, legend, font)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        alpha: float = 0.5,
        scores: bool = False,
        font: str | os.PathLike[str] | None = None,
    ) -> None:
        """Write the result to a file, whole or not at all.

        Args:
            path: .png, .jpg or .jpeg for the overlay; .npz for the arrays `labels` (H, W) int32 and `classes` (T,).
            alpha: opacity of the overlay's colours, 0..1.
            font: of the overlay's legend, see `visualize.overlay`.
            scores: add the array `scores` (T, H, W) float32 to an .npz file.

        Raises:
            ValueError: another suffix, `alpha` outside 0..1, or `scores` for a picture. OSError: it cannot be written.
        """
        check_number("alpha", alpha, 0, 1, "an opacity")
        suffix = Path(path).suffix.lower()
        if suffix not in (".png", ".jpg", ".jpeg", ".npz"):
            raise ValueError(f"path must end in .png or .jpg (overlay) or .npz (labels), got '{path}'.")
        if suffix != ".npz":
            if scores:
                raise ValueError(f"scores can only be saved to an .npz file, got '{path}'.")
            picture = self.overlay(alpha, font=font)
            write_whole(path, lambda file: picture.save(file, quality=92))  # PNG ignores the quality
            return
        arrays: dict[str, Any] = {"labels": self.labels, "classes": np.array(self.classes, dtype=str)}
        if scores:
            arrays["scores"] = self.scores

        def write(file: Path) -> None:
            with open(file, "wb") as stream:
                np.savez_compressed(stream, **arrays)

        write_whole(path, write)

    def save_labels(self, path: str | os.PathLike[str]) -> None:
        """Write the labels as a .png file of indices into `classes`, see `visualize.label_image`. Errors as `save`."""
        if Path(path).suffix.lower() != ".png":
            raise ValueError(f"path must end in .png, got '{path}'; other formats would change the labels.")
        write_whole(path, visualize.label_image(self.labels, len(self.classes)).save)

    def summary(self, most: int = 3) -> str:
        """The classes that fill most of the picture, as "cat 62 %, grass 30 %"."""
        counts = self.counts()
        largest = np.argsort(-counts, kind="stable")[:most]
        shares = [f"{self.classes[i]} {100 * counts[i] / counts.sum():.0f} %" for i in largest.tolist() if counts[i]]
        return ", ".join(shares) + (", …" if np.count_nonzero(counts) > len(shares) else "")

    def __copy__(self) -> Segmentation:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _lock=threading.Lock())
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Segmentation:
        twin = copy.copy(self)  # what computes the scores is shared, as it changes nothing
        twin.image, twin.classes, twin.labels = self.image.copy(), list(self.classes), self.labels.copy()
        twin._scores = None if self._scores is None else self._scores.copy()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Without what computes scores, which holds the model's logits."""
        top = None if self._compute_top is None else _refuse_top
        state = {**self.__dict__, "_compute_scores": None, "_compute_top": top}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __repr__(self) -> str:
        return f"<Segmentation {self.image.width} x {self.image.height}, {len(self.classes)} classes: {self.summary()}>"


def _refuse_top(k: int) -> tuple[np.ndarray, np.ndarray]:
    raise RuntimeError(NOT_KEPT)
