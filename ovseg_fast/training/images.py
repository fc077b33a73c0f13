"""Training images by their position in a run. No single pair ends a run: another takes the place of an unusable one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from .. import data
from ..data.augmentation import Augmentation
from ..evaluation.results import Skipped

TRIES = 100  # pairs in a row that cannot be used end a run
NAMED = 10  # pairs that are named one by one; a count tells of the rest

logger = logging.getLogger(__name__)


def stream(*numbers: int) -> int:
    """A different seed for each combination of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Sample(NamedTuple):
    """Augmented image (3, s, s) uint8 and labels (s, s) int64, None if no pair could be used; and those left out."""

    image: Tensor | None
    labels: Tensor | None
    skipped: tuple[Skipped, ...] = ()


class Batch(NamedTuple):
    """Several samples: (B, 3, s, s) uint8 and (B, s, s) int64."""

    images: Tensor
    labels: Tensor


class TrainingImages(torch.utils.data.Dataset[Sample]):
    """Position in a run -> sample, whoever asks and whenever. Each pass over the dataset has another order.

    A pair that cannot be used is replaced by the next one in the same order, so that a resumed run sees the same. What
    failed is returned and not raised, since an error from a loader process hides the file behind its own words."""

    def __init__(self, dataset: data.Dataset, augment: Augmentation, seed: int) -> None:
        self.dataset, self.augment, self.seed = dataset, augment, seed

    def __getitem__(self, position: int) -> Sample:
        count = len(self.dataset)
        turn, place = divmod(position, count)
        order = np.random.default_rng((self.seed, turn)).permutation(count)
        failed: list[Skipped] = []
        for number in range(min(count, TRIES)):
            index = int(order[(place + number) % count])
            try:
                image, labels = self.dataset.read(index)
                generator = torch.Generator().manual_seed(stream(self.seed, position))
                return Sample(*self.augment(image, labels, generator), tuple(failed))
            except Exception as error:
                failed.append(Skipped.of(self.dataset.pairs[index].name, error))
        return Sample(None, None, tuple(failed))


def collate(samples: Sequence[Sample]) -> tuple[Batch | None, tuple[Skipped, ...]]:
    """Samples as a batch, None if one has no image; and the pairs that were left out."""
    failed = tuple(item for sample in samples for item in sample.skipped)
    images = [sample.image for sample in samples if sample.image is not None]
    labels = [sample.labels for sample in samples if sample.labels is not None]
    if len(images) < len(samples):
        return None, failed
    return Batch(torch.stack(images), torch.stack(labels)), failed


class LeftOut:
    """Tells of pairs that are left out, each once, and of many by a count."""

    def __init__(self, count: int) -> None:
        self.count, self.known = count, dict[str, str]()

    def add(self, items: Sequence[Skipped]) -> None:
        for name, reason in items:
            if name not in self.known:
                self.known[name] = reason
                if len(self.known) <= NAMED:
                    logger.warning("%s is left out, another image takes its place: %s", name, reason)
                elif len(self.known) == NAMED + 1:
                    logger.warning("more than %d pairs are left out; their number is told at the end", NAMED)

    def give_up(self) -> NoReturn:
        """Raises ValueError that names the first."""
        name, reason = next(iter(self.known.items()))
        which = f"{TRIES} pairs in a row" if self.count > TRIES else f"all {self.count} pairs"
        raise ValueError(f"{which} of the training data cannot be used; the first, {name}: {reason}")

    def summarise(self) -> None:
        if self.known:
            name, reason = next(iter(self.known.items()))
            logger.warning(
                "%d of %d pairs of the training data were left out; the first, %s: %s",
                *(len(self.known), self.count, name, reason),
            )
