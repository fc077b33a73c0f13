"""Texts and labels of the classes that a training step passes to the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ovseg_fast.training.objective import Objective


class Recorder(nn.Module):
    """A model that keeps what its loss is asked."""

    def text_from_prompts(self, prompts: Tensor) -> Tensor:
        return prompts

    def loss(self, images: Tensor, labels: Tensor, text: Tensor) -> dict[str, Tensor]:
        self.labels, self.text = labels, text
        return {"loss": text.sum()}


def ask(labels: Tensor, classes: int, unseen: tuple[int, ...], sample: bool) -> tuple[list[int], Tensor]:
    """The classes taken, by index, and the labels among them."""
    model = Recorder()
    prompts = torch.arange(classes, dtype=torch.float32).view(classes, 1, 1)
    Objective(model, prompts, unseen, sample)(torch.zeros(1), labels)
    return model.text.flatten().long().tolist(), model.labels


def test_all_seen_classes_are_trained(rng: torch.Generator) -> None:
    labels = torch.tensor([[[0, 1, 2, 3, -1]]])
    taken, asked = ask(labels, 5, (1, 4), sample=False)
    assert taken == [0, 2, 3]
    assert asked.flatten().tolist() == [0, -1, 1, 2, -1]


def test_sampled_classes_include_all_in_the_labels(rng: torch.Generator) -> None:
    unseen = (3, 10, 11)
    sizes = set()
    for _ in range(60):
        labels = torch.randint(-1, 6, (2, 4, 4), generator=rng)
        taken, asked = ask(labels, 30, unseen, sample=True)
        assert taken == sorted(set(taken)) and not set(taken) & set(unseen)
        expected = [taken.index(label) if label in taken else -1 for label in labels.flatten().tolist()]
        assert asked.flatten().tolist() == expected
        assert {label for label in labels.flatten().tolist() if label >= 0 and label not in unseen} <= set(taken)
        sizes.add(len(taken))
    assert min(sizes) < 12 and max(sizes) > 20


@pytest.mark.parametrize("labels", [torch.full((1, 2, 2), -1), torch.tensor([[[3, 3]]])])
def test_one_class_is_sampled_if_the_labels_have_none(labels: Tensor) -> None:
    for _ in range(10):
        taken, asked = ask(labels, 4, (3,), sample=True)
        assert 1 <= len(taken) <= 3 and bool((asked == -1).all())


def test_all_classes_are_taken_if_all_are_in_the_labels() -> None:
    assert ask(torch.tensor([[[0, 1, 2]]]), 4, (3,), sample=True)[0] == [0, 1, 2]
