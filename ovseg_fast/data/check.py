"""What is wrong with a dataset, reported before anything is trained or measured on it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from ..images import ImageError, MissingImageError, load_image
from .datasets import Dataset, Pair, SegmentationDataset, fit, image_files, mask_files
from .masks import DataError, read_mask

Result = TypeVar("Result")

KINDS = {
    "empty": "empty folder",
    "missing-image": "missing image",
    "missing-mask": "missing mask",
    "case": "names that differ only in case",
    "duplicate": "several files for one name",
    "unreadable-image": "unreadable image",
    "unreadable-mask": "unreadable mask",
    "size": "mask of another size",
    "label": "label beyond the class list",
}


@dataclass(frozen=True)
class Problem:
    """A problem of the pair `name` (of the folder, if that is empty): its kind (of `KINDS`) and a sentence about it."""

    name: str
    kind: str
    sentence: str


def check_dataset(dataset: Dataset, *, progress: bool = False, workers: int | None = None) -> list[Problem]:
    """Read every pair of a dataset and report what is broken or does not fit.

    Args:
        dataset: from `open_dataset`.
        progress: show a progress bar.
        workers: threads that read; by default one per core.

    Returns:
        The problems in the order of the pairs; a pair can have several. An empty list means that every pair can be
        read.

    Raises:
        ValueError: the dataset is drawn, so there are no files to check.
    """
    if not isinstance(dataset, SegmentationDataset):
        raise ValueError(f"{dataset.name} is drawn from a seed, it has no files to check.")
    if problems := list(_empty(dataset)):
        return problems
    from tqdm import tqdm

    listed = _Names(dataset)
    problems = [problem for pair in dataset.pairs for problem in listed.problems(pair)]
    complete = [pair for pair in dataset.pairs if not listed.is_incomplete(pair)]
    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)
    try:
        # map keeps the order and reads ahead of the bar; decoding releases Python's lock.
        found = pool.map(lambda pair: _content(dataset, pair), complete)
        for some in tqdm(found, total=len(complete), unit="pair", disable=None if progress else True):
            problems.extend(some)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the rest
    order = {pair.name: index for index, pair in enumerate(dataset.pairs)}
    return sorted(problems, key=lambda problem: order[problem.name])  # stable: within a pair as found


def report(problems: Sequence[Problem]) -> str:
    """Problems as text for the command line: one sentence per line, then the number of each kind."""
    if not problems:
        return "no problem found."
    counts = Counter(problem.kind for problem in problems)
    lines = [f"{problem.name}: {problem.sentence}" for problem in problems]
    summary = ", ".join(f"{KINDS[kind]}: {counts[kind]}" for kind in KINDS if counts[kind])
    number = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return "\n".join([*lines, f"{number} ({summary})."])


def _empty(dataset: SegmentationDataset) -> Iterator[Problem]:
    """A folder without a single usable file is one problem, not one for each pair."""
    if not image_files(dataset.image_folder):
        yield Problem(str(dataset.image_folder), "empty", f"folder '{dataset.image_folder}' holds no image.")
    if not mask_files(dataset.mask_folders, dataset.mask_suffixes):
        folders = " and ".join(f"'{folder}'" for folder in dataset.mask_folders)
        sentence = f"folder {folders} holds no mask, that is, no file *{' or '.join(dataset.mask_suffixes)}."
        yield Problem(str(dataset.mask_folders[0]), "empty", sentence)
    elif not dataset.pairs:
        yield Problem(dataset.name, "empty", f"the list of this split of {dataset.name} names no pair.")


class _Names:
    """The problems that show in file names alone, from one listing of each folder."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.images = image_files(dataset.image_folder)
        self.masks = mask_files(dataset.mask_folders, dataset.mask_suffixes)
        # What really exists, by name in lower case.
        self.image_twins = {name.casefold(): files[0] for name, files in self.images.items()}
        self.mask_twins = {name.casefold(): files[0] for name, files in self.masks.items()}
        self.count = Counter(pair.name.casefold() for pair in dataset.pairs)
        self.reported: set[str] = set()

    def is_incomplete(self, pair: Pair) -> bool:
        return pair.name not in self.images or pair.name not in self.masks

    def problems(self, pair: Pair) -> Iterator[Problem]:
        image, mask = self.images.get(pair.name, []), self.masks.get(pair.name, [])
        key = pair.name.casefold()
        for what, files in (("image", image), ("mask", mask)):
            if len(files) > 1:
                listed = ", ".join(f"'{file.name}'" for file in files)
                sentence = f"{what}s {listed} in '{files[0].parent}' share a name; the first is used."
                yield Problem(pair.name, "duplicate", sentence)
        # Names that differ in case are two pairs; one sentence covers both.
        if self.is_incomplete(pair) and key in self.image_twins and key in self.mask_twins:
            sentence = (
                f"image '{self.image_twins[key]}', mask '{self.mask_twins[key]}' and the pair's name {pair.name!r} "
                "differ in upper and lower case; expected one spelling."
            )
        else:
            if not image:
                reason = f"mask '{pair.mask}' has none" if mask else "the list of this split names it"
                yield Problem(pair.name, "missing-image", f"there is no image '{pair.image}'; {reason}.")
            if not mask:
                yield Problem(pair.name, "missing-mask", f"there is no mask '{pair.mask}' for image '{pair.image}'.")
            if self.is_incomplete(pair) or self.count[key] == 1:
                return
            sentence = (
                f"another pair's name differs from {pair.name!r} only in upper and lower case, which many file systems "
                "take for the same file."
            )
        if key not in self.reported:
            self.reported.add(key)
            yield Problem(pair.name, "case", sentence)


def _content(dataset: SegmentationDataset, pair: Pair) -> list[Problem]:
    """The problems that show when the two files are decoded."""
    found: list[Problem] = []

    def attempt(step: Callable[[], Result]) -> Result | None:
        try:
            return step()
        except DataError as error:
            found.append(Problem(pair.name, error.kind, str(error)))
        except ImageError as error:
            kind = "missing-image" if isinstance(error, MissingImageError) else "unreadable-image"
            found.append(Problem(pair.name, kind, str(error)))
        return None

    image, values = attempt(lambda: load_image(pair.image)), attempt(lambda: read_mask(pair.mask))
    if values is not None:
        if image is not None:
            attempt(lambda: fit(pair, image, values))
        attempt(lambda: dataset.values.labels(values, pair.mask))
    return found
