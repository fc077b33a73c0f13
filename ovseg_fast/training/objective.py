"""What a training step computes: the published loss of a model on the texts of its classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models import SegmentationModel
from .labels import pseudo_labels, seen_classes, seen_labels


class Objective(nn.Module):
    """A model with the texts of its classes: images and labels in, the published loss out.

    Args:
        prompts: of all classes, as tokens (T, P, 77) if the text encoder is trained, else as embeddings (T, P, E).
        unseen: indices of the classes that are not trained on. sample_classes: see `TrainingConfig`.
    """

    def __init__(
        self, model: SegmentationModel, prompts: Tensor, unseen: tuple[int, ...], sample_classes: bool = False
    ) -> None:
        super().__init__()
        self.model, self.prompts, self.unseen, self.sample_classes = model, prompts, unseen, sample_classes
        self.seen = seen_classes(len(prompts), unseen)

    def _embed(self, classes: list[int]) -> Tensor:
        prompts = self.prompts[classes]
        return self.model.text_from_prompts(prompts if prompts.is_floating_point() else self.model.encode_text(prompts))

    def forward(self, images: Tensor, labels: Tensor, transductive: bool = False) -> dict[str, Tensor]:
        """(B, 3, s, s) uint8 and (B, s, s) indices of all classes -> named losses. Transductively, all classes are
        trained on, the unseen ones by labels that the model predicts."""
        if not transductive:
            chosen = self._sample(labels) if self.sample_classes else self.seen
            left_out = set(range(len(self.prompts))) - set(chosen)
            return self.model.loss(images, seen_labels(labels, len(self.prompts), left_out), self._embed(chosen))
        text = self._embed(list(range(len(self.prompts))))
        with torch.no_grad():
            logits = self.model.decode(self.model.encode_image(images), text)
        return self.model.loss(images, pseudo_labels(logits, labels, self.unseen), text)

    def _sample(self, labels: Tensor) -> list[int]:
        """The seen classes that are in the labels, and any number of others, at least one."""
        shown = set(labels.unique().tolist()).intersection(self.seen)
        others = [index for index in self.seen if index not in shown]
        if not others:
            return self.seen
        count = int(torch.randint(1, len(others) + 1, ()))
        return sorted([*shown, *(others[place] for place in torch.randperm(len(others))[:count])])
