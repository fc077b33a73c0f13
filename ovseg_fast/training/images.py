"""Training images by their position in a run."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import data
from ..data.augmentation import Augmentation


def stream(*numbers: int) -> int:
    """A different seed for each combination of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class TrainingImages(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Position in a run -> augmented image (3, s, s) uint8 and labels (s, s) int64, whoever asks and whenever. Each
    pass over the dataset has another order."""

    def __init__(self, dataset: data.Dataset, augment: Augmentation, seed: int) -> None:
        self.dataset, self.augment, self.seed = dataset, augment, seed

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        turn, place = divmod(position, len(self.dataset))
        order = np.random.default_rng((self.seed, turn)).permutation(len(self.dataset))
        image, labels = self.dataset.read(int(order[place]))
        return self.augment(image, labels, torch.Generator().manual_seed(stream(self.seed, position)))
