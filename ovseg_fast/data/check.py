"""What is wrong with a dataset, named before anything is trained or measured on it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..images import ImageError, MissingImageError, load_image
from .datasets import Pair, SegmentationDataset, fit, image_files, mask_files
from .masks import DataError, read_mask

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
    """Something wrong with a pair.

    Args:
        name: of the pair; of the folder where that is empty.
        kind: one of `KINDS`.
        sentence: what is wrong, with the file that it is wrong with.
    """

    name: str
    kind: str
    sentence: str


def check_dataset(dataset: SegmentationDataset, *, progress: bool = False, workers: int | None = None) -> list[Problem]:
    """Read every pair of a dataset and name what is broken or does not fit.

    Args:
        dataset: what `open_dataset` found.
        progress: show a progress bar.
        workers: threads that read; by default as many as there are cores.

    Returns:
        The problems in the order of the pairs; a pair can have several. An empty list means that every pair can be
        read.
    """
    if problems := list(_empty(dataset)):
        return problems
    from tqdm import tqdm

    named = _Names(dataset)
    problems = [problem for pair in dataset.pairs for problem in named.problems(pair)]
    sound = [pair for pair in dataset.pairs if not named.has_missing(pair)]
    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)
    try:
        # map keeps the order and reads ahead of the bar; decoding leaves Python's lock.
        found = pool.map(lambda pair: list(_content(dataset, pair)), sound)
        for some in tqdm(found, total=len(sound), unit="pair", disable=None if progress else True):
            problems.extend(some)
    finally:
        pool.shutdown(cancel_futures=True)  # who interrupts is not made to wait for the rest
    order = {pair.name: index for index, pair in enumerate(dataset.pairs)}
    return sorted(problems, key=lambda problem: order[problem.name])  # stable: within a pair as found


def report(problems: Sequence[Problem]) -> str:
    """Problems as text for the command line: a sentence a line, then how many there are of each kind."""
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
    if not any(mask_files(folder, dataset.mask_suffixes) for folder in dataset.mask_folders):
        folders = " and ".join(f"'{folder}'" for folder in dataset.mask_folders)
        endings = " or ".join(dataset.mask_suffixes)
        yield Problem(
            str(dataset.mask_folders[0]), "empty", f"folder {folders} holds no mask, that is, no file *{endings}."
        )
    elif not dataset.pairs:
        yield Problem(dataset.name, "empty", f"the list of this split of {dataset.name} names no pair.")


class _Names:
    """What the names of the files alone tell, from one listing of each folder."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.images = image_files(dataset.image_folder)
        self.masks: dict[str, list[Path]] = {}
        for folder in dataset.mask_folders:
            for name, files in mask_files(folder, dataset.mask_suffixes).items():
                self.masks.setdefault(name, files)
        # By the name in lower case, what there really is.
        self.image_twins = {name.casefold(): files[0] for name, files in self.images.items()}
        self.mask_twins = {name.casefold(): files[0] for name, files in self.masks.items()}
        self.same = Counter(pair.name.casefold() for pair in dataset.pairs)
        self.said: set[str] = set()

    def has_missing(self, pair: Pair) -> bool:
        return pair.name not in self.images or pair.name not in self.masks

    def problems(self, pair: Pair) -> Iterator[Problem]:
        image, mask = self.images.get(pair.name, []), self.masks.get(pair.name, [])
        key = pair.name.casefold()
        for what, files in (("image", image), ("mask", mask)):
            if len(files) > 1:
                listed = ", ".join(f"'{file.name}'" for file in files)
                yield Problem(
                    pair.name, "duplicate", f"{what}s {listed} in '{files[0].parent}' share a name; the first is used."
                )
        if self.has_missing(pair) and key in self.image_twins and key in self.mask_twins:
            if key not in self.said:  # the two halves are pairs of their own; one sentence tells of both
                self.said.add(key)
                yield Problem(
                    pair.name,
                    "case",
                    f"image '{self.image_twins[key]}', mask '{self.mask_twins[key]}' and the pair's name {pair.name!r} "
                    "differ in upper and lower case; expected one spelling.",
                )
            return
        if not image:
            of = f"mask '{pair.mask}' has none" if mask else "the list of this split names it"
            yield Problem(pair.name, "missing-image", f"there is no image '{pair.image}'; {of}.")
        if not mask:
            yield Problem(pair.name, "missing-mask", f"there is no mask '{pair.mask}' for image '{pair.image}'.")
        if image and mask and self.same[key] > 1 and key not in self.said:
            self.said.add(key)
            yield Problem(
                pair.name,
                "case",
                f"another pair's name differs from {pair.name!r} only in upper and lower case, which many file systems "
                "take for the same file.",
            )


def _content(dataset: SegmentationDataset, pair: Pair) -> Iterator[Problem]:
    """What decoding the two files tells."""
    image = values = None
    try:
        image = load_image(pair.image)
    except ImageError as error:
        kind = "missing-image" if isinstance(error, MissingImageError) else "unreadable-image"
        yield Problem(pair.name, kind, str(error))
    try:
        values = read_mask(pair.mask)
    except DataError as error:
        yield Problem(pair.name, error.kind, str(error))
    if values is None:
        return
    if image is not None:
        try:
            fit(pair, image, values)
        except DataError as error:
            yield Problem(pair.name, error.kind, str(error))
    try:
        dataset.values.labels(values, pair.mask)
    except DataError as error:
        yield Problem(pair.name, error.kind, str(error))
