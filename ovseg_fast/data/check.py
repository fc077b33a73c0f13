"""What is wrong with a dataset, reported before anything is trained or measured on it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from ..images import SUFFIXES, ImageError, MissingImageError, load_image
from .datasets import Dataset, Files, Pair, SegmentationDataset, files_by_name, fit
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
        dataset: from `open_dataset`. progress: show a progress bar.
        workers: threads that read; by default one per core.

    Returns:
        The problems in the order of the pairs; a pair can have several.

    Raises:
        ValueError: the dataset is drawn, so there are no files to check.
    """
    if not isinstance(dataset, SegmentationDataset):
        raise ValueError(f"{dataset.name} is drawn from a seed, it has no files to check.")
    from tqdm import tqdm

    images = files_by_name((dataset.image_folder,), SUFFIXES)
    masks = files_by_name(dataset.mask_folders, dataset.mask_suffixes)
    if problems := list(_empty(dataset, images, masks)):
        return problems
    problems = list(_names(dataset, images, masks))
    complete = [pair for pair in dataset.pairs if pair.name in images and pair.name in masks]
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
    summary = ", ".join(f"{KINDS[kind]}: {counts[kind]}" for kind in KINDS if counts[kind])
    number = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return "\n".join([*(f"{problem.name}: {problem.sentence}" for problem in problems), f"{number} ({summary})."])


def _empty(dataset: SegmentationDataset, images: Files, masks: Files) -> Iterator[Problem]:
    """A folder without a single usable file is one problem, not one for each pair."""
    if not images:
        yield Problem(str(dataset.image_folder), "empty", f"folder '{dataset.image_folder}' holds no image.")
    if not masks:
        folders = " and ".join(f"'{folder}'" for folder in dataset.mask_folders)
        sentence = f"folder {folders} holds no mask, that is, no file *{' or '.join(dataset.mask_suffixes)}."
        yield Problem(str(dataset.mask_folders[0]), "empty", sentence)
    elif not dataset.pairs:
        yield Problem(dataset.name, "empty", f"the list of this split of {dataset.name} names no pair.")


def _names(dataset: SegmentationDataset, images: Files, masks: Files) -> Iterator[Problem]:
    """The problems that show in file names alone."""
    # What really exists, by name in lower case.
    image_twins, mask_twins = (
        {name.casefold(): files[0] for name, files in found.items()} for found in (images, masks)
    )
    count = Counter(pair.name.casefold() for pair in dataset.pairs)
    reported: set[str] = set()
    for pair in dataset.pairs:
        image, mask, key = images.get(pair.name, []), masks.get(pair.name, []), pair.name.casefold()
        for what, files in (("image", image), ("mask", mask)):
            if len(files) > 1:
                listed = ", ".join(f"'{file.name}'" for file in files)
                sentence = f"{what}s {listed} in '{files[0].parent}' share a name; the first is used."
                yield Problem(pair.name, "duplicate", sentence)
        # Names that differ in case are two pairs; one sentence covers both.
        if not (image and mask) and key in image_twins and key in mask_twins:
            sentence = (
                f"image '{image_twins[key]}', mask '{mask_twins[key]}' and the pair's name {pair.name!r} differ in "
                "upper and lower case; expected one spelling."
            )
        else:
            if not image:
                reason = f"mask '{pair.mask}' has none" if mask else "the list of this split names it"
                yield Problem(pair.name, "missing-image", f"there is no image '{pair.image}'; {reason}.")
            if not mask:
                yield Problem(pair.name, "missing-mask", f"there is no mask '{pair.mask}' for image '{pair.image}'.")
            if not (image and mask) or count[key] == 1:
                continue
            sentence = (
                f"another pair's name differs from {pair.name!r} only in upper and lower case, which many file systems "
                "take for the same file."
            )
        if key not in reported:
            reported.add(key)
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
