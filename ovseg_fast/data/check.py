"""What is wrong with a dataset, reported before anything is trained or measured on it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple, TypeVar

import numpy as np

from ..images import ImageError, MissingImageError, TooLargeError, enough_memory, load_image, passed_over, suffixes
from .datasets import Dataset, Files, Pair, SegmentationDataset, files_by_name, fit
from .masks import NO_CLASS, DataError, read_mask

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
    "memory": "too large for the memory",
}
BINARY_SHARE = 0.1  # of the masks; fewer that hold 0 and 255 alone are no reason for a note


@dataclass(frozen=True)
class Problem:
    """A problem of the pair `name` (of the folder, if that is empty): its kind (of `KINDS`) and a sentence about it."""

    name: str
    kind: str
    sentence: str


@dataclass
class ClassPixels:
    """What masks show, counted over those that could be read.

    Args:
        classes: T names. pixels: (T,) of each class. masks: how many were read. whole: these are all of the split.
        binary: masks that hold 0 and 255 alone where 255 is no class, and a second class could be meant by it.
    """

    classes: Sequence[str]
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    masks: int = 0
    binary: int = 0
    whole: bool = True

    def __post_init__(self) -> None:
        self.pixels = np.zeros(len(self.classes), np.int64)

    def add(self, values: np.ndarray, labels: np.ndarray) -> None:
        """Count a mask: its values (H, W) as stored, and its labels (H, W), -1 for no class."""
        self.masks += 1
        self.pixels += np.bincount(labels.ravel() + 1, minlength=len(self.classes) + 1)[1:]
        if len(self.classes) > 1 and values.size and values.max() == 255 and values.min() == 0:
            void = values == 255
            two = bool((void | (values == 0)).all())
            self.binary += two and bool((labels[void] == NO_CLASS).all() and (labels[~void] == 0).all())

    def notes(self) -> list[str]:
        """Sentences about what is allowed but hardly meant."""
        if not self.masks:
            return []
        found = []
        masks = "the split" if self.whole else f"{self.masks} masks"
        if self.binary > BINARY_SHARE * self.masks:
            count = f"{self.binary} of {self.masks} masks hold 0 and 255 alone"
            found.append(f"{count}; 255 is no class: write 1 for class 1, {self.classes[1]!r}.")
        absent = [name for name, count in zip(self.classes, self.pixels.tolist(), strict=True) if not count]
        if len(absent) == len(self.classes):
            found.append(f"no pixel of {masks} shows any class: every one holds a value that means no class.")
        elif absent:
            names = ", ".join(absent[:10]) + (f" and {len(absent) - 10} more" if len(absent) > 10 else "")
            found.append(f"no pixel of {masks} shows {len(absent)} of the {len(self.classes)} classes: {names}.")
        return found


class Findings(NamedTuple):
    """`problems` in the order of the pairs; `notes`: sentences about what is allowed but hardly meant."""

    problems: list[Problem]
    notes: list[str]


def class_pixels(dataset: Dataset, sample: int | None = None) -> ClassPixels:
    """The pixels of each class in the masks of a dataset, or in a sample of so many spread over it.

    Masks that cannot be used are left out. Empty for a drawn dataset, which shows all its classes.
    """
    found = ClassPixels(dataset.vocabulary.classes)
    if not isinstance(dataset, SegmentationDataset):
        return found
    count = len(dataset) if sample is None else min(sample, len(dataset))
    found.whole = count == len(dataset)
    for place in range(count):
        pair = dataset.pairs[place * len(dataset) // count]
        try:
            values = read_mask(pair.mask, dataset.max_side)
            found.add(values, dataset.values.labels(values, pair.mask))
        except DataError:
            continue
    return found


def check_dataset(dataset: Dataset, *, progress: bool = False, workers: int | None = None) -> list[Problem]:
    """The problems that `examine` finds; arguments and errors are the same."""
    return examine(dataset, progress=progress, workers=workers).problems


def examine(dataset: Dataset, *, progress: bool = False, workers: int | None = None) -> Findings:
    """Read every pair of a dataset and report what is broken or does not fit, and what is hardly meant.

    Args:
        dataset: from `open_dataset`. progress: show a progress bar.
        workers: threads that read; by default one per core.

    Returns:
        The problems in the order of the pairs; a pair can have several. Notes on classes that no pixel shows, masks of
        0 and 255 alone, and in one's own folder, files passed over.

    Raises:
        ValueError: the dataset is drawn, so there are no files to check.
    """
    if not isinstance(dataset, SegmentationDataset):
        raise ValueError(f"{dataset.name} is drawn from a seed, it has no files to check.")
    from tqdm import tqdm

    images = files_by_name((dataset.image_folder,), suffixes())
    masks = files_by_name(dataset.mask_folders, dataset.mask_suffixes)
    notes = list(_passed_over(dataset, images, masks))
    if problems := list(_empty(dataset, images, masks)):
        return Findings(problems, notes)
    problems = list(_names(dataset, images, masks))
    complete = [pair for pair in dataset.pairs if pair.name in images and pair.name in masks]
    counted = ClassPixels(dataset.vocabulary.classes)
    lock = Lock()
    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)
    try:
        # map keeps the order and reads ahead of the bar; decoding releases Python's lock.
        found = pool.map(lambda pair: _content(dataset, pair, counted, lock), complete)
        for some in tqdm(found, total=len(complete), unit="pair", disable=None if progress else True):
            problems.extend(some)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the rest
    order = {pair.name: index for index, pair in enumerate(dataset.pairs)}
    problems.sort(key=lambda problem: order[problem.name])  # stable: within a pair as found
    return Findings(problems, counted.notes() + notes)


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


def _passed_over(dataset: SegmentationDataset, images: Files, masks: Files) -> Iterator[str]:
    """Sentences about files in one's own folder that are neither images nor masks."""
    if dataset.name == "folder":
        for folder, files in ((dataset.image_folder, images), *((folder, masks) for folder in dataset.mask_folders)):
            if folder.is_dir():
                yield from passed_over(folder, [file for some in files.values() for file in some])


def _content(dataset: SegmentationDataset, pair: Pair, counted: ClassPixels, lock: Lock) -> list[Problem]:
    """The problems that show when the two files are decoded; the mask's pixels are counted."""
    found: list[Problem] = []

    def attempt(what: str, step: Callable[[], Result]) -> Result | None:
        try:
            with enough_memory(what):
                return step()
        except DataError as error:
            found.append(Problem(pair.name, error.kind, str(error)))
        except ImageError as error:
            kinds = {MissingImageError: "missing-image", TooLargeError: "memory"}
            found.append(Problem(pair.name, kinds.get(type(error), "unreadable-image"), str(error)))
        return None

    def count(values: np.ndarray) -> None:
        labels = dataset.values.labels(values, pair.mask)
        with lock:
            counted.add(values, labels)

    image = attempt(f"image '{pair.image}'", lambda: load_image(pair.image, dataset.max_side))
    values = attempt(f"mask '{pair.mask}'", lambda: read_mask(pair.mask, dataset.max_side))
    if values is not None:
        if image is not None:
            attempt(f"image '{pair.image}'", lambda: fit(pair, image, values))
        attempt(f"mask '{pair.mask}'", lambda: count(values))
    return found
