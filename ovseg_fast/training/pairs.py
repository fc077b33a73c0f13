"""The pairs that a run trains on: which of them can be used, and what is remembered of them to resume."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data import Dataset, SegmentationDataset, open_dataset
from ..data.check import class_pixels
from .config import DataConfig

# Images of a dataset without an end, if the configuration sets no limit: to train on, and to validate with.
ENDLESS, VALIDATED = 100_000, 500
LOOKED_AT = 100  # masks, before a run begins

logger = logging.getLogger(__name__)


def open_data(config: DataConfig, split: str, table: str) -> Dataset:
    """The dataset of a table of the configuration, without the pairs that lack a file; `split` if that names none.

    Raises:
        ValueError, OSError: as `open_dataset`, or no pair is left. The sentence names the table.
    """
    try:
        endless = ENDLESS if table == "data" else VALIDATED
        dataset = open_dataset(config.dataset, config.root, config.split or split, limit=config.limit, endless=endless)
    except (ValueError, OSError) as error:
        text = re.sub("^name must", "dataset must", str(error))  # as the key is called
        raise (OSError if isinstance(error, OSError) else ValueError)(f"in [{table}]: {text}") from None
    what = f"the dataset {config.dataset} in '{config.root}'"
    if not len(dataset):
        raise ValueError(f"in [{table}]: {what} holds no image.")
    if not isinstance(dataset, SegmentationDataset):
        return dataset
    whole = [pair for pair in dataset.pairs if pair.image.is_file() and pair.mask.is_file()]
    if len(whole) == len(dataset.pairs):
        return dataset
    kept = set(whole)
    first = next(pair for pair in dataset.pairs if pair not in kept)
    lost = f"mask '{first.mask}'" if first.image.is_file() else f"image '{first.image}'"
    if not whole:
        raise ValueError(f"in [{table}]: {what} holds no pair of image and mask; for {first.name}, there is no {lost}.")
    left = len(dataset.pairs) - len(whole)
    logger.warning(
        "%s: %d of %d pairs lack image or mask and are left out; the first, %s: there is no %s",
        *(table, left, len(dataset.pairs), first.name, lost),
    )
    return replace(dataset, pairs=whole)


def warn_of_masks(dataset: Dataset, table: str = "data") -> None:
    """Warn if masks spread over the dataset hold no class, or 0 and 255 alone; or if all to train on leave out a
    class."""
    found = class_pixels(dataset, LOOKED_AT)
    if (found.whole and table == "data") or found.binary or not found.pixels.any():
        for note in found.notes():
            logger.warning("%s: %s", table, note)


@dataclass(frozen=True)
class Contents:
    """What is remembered of a dataset: its classes and pairs, by name and in order, as they give labels and images
    their meaning; and a number for each pair's files, (N,) int64, that changes with them (None if it has none)."""

    classes: tuple[str, ...]
    unseen: tuple[int, ...]
    count: int
    digest: str
    stamps: Tensor | None

    @classmethod
    def of(cls, dataset: Dataset) -> Contents:
        names = [pair.name for pair in dataset.pairs]
        digest = _digest("\0".join(names)).hex()
        stamps = None
        if isinstance(dataset, SegmentationDataset):
            stamps = torch.tensor([_stamp(pair.image, pair.mask) for pair in dataset.pairs])
        return cls(dataset.vocabulary.classes, dataset.vocabulary.unseen, len(names), digest, stamps)

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> Contents:
        """From the dict of a checkpoint. Raises TypeError if it is something else."""
        contents = cls(**saved)
        tuples = isinstance(contents.classes, tuple) and isinstance(contents.unseen, tuple)
        numbers = contents.stamps
        if not tuples or (
            numbers is not None and (not isinstance(numbers, Tensor) or numbers.shape != (contents.count,))
        ):
            raise TypeError("contents of another form")
        return contents

    def changes(self, saved: Contents) -> list[str]:
        """How a saved dataset differs in classes and pairs, as parts of a sentence."""
        found = []
        if saved.classes != self.classes:
            place = next((i for i, (a, b) in enumerate(zip(saved.classes, self.classes, strict=False)) if a != b), None)
            if place is None:
                found.append(f"{len(saved.classes)} classes are now {len(self.classes)}")
            else:
                found.append(f"class {place}, {saved.classes[place]!r}, is now {self.classes[place]!r}")
        if saved.unseen != self.unseen:
            found.append("other classes are unseen")
        if saved.count != self.count:
            found.append(f"{saved.count} images are now {self.count}")
        elif saved.digest != self.digest:
            found.append("the images have other names, or another order")
        return found

    def changed_files(self, saved: Contents) -> Tensor:
        """Positions of the pairs, which are the same by name, whose files changed in size or time."""
        if self.stamps is None or saved.stamps is None:
            return torch.zeros(0, dtype=torch.int64)
        return (self.stamps != saved.stamps).nonzero().flatten()


def _stamp(*files: os.PathLike[str]) -> int:
    facts: list[Any] = []
    for file in files:
        try:
            status = os.stat(file)
        except OSError:
            facts.append(None)
        else:
            facts.append((status.st_size, status.st_mtime_ns))
    return int.from_bytes(_digest(repr(facts))[:8], "big", signed=True)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
