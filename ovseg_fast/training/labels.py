"""Labels of zero-shot training: Cascade-CLIP, arXiv 2406.00670, section 4.1, where the transductive phase is called
"self-training"."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from .. import ops
from ..data.masks import NO_CLASS
from ..models.losses import check_label_maps
from ..ops.common.checks import check_tensors


def seen_labels(labels: Tensor, classes: int, unseen: Collection[int]) -> Tensor:
    """Labels for inductive training, int64: seen classes renumbered 0..S-1 in order, −1 for no class and unseen ones.

    Args:
        labels: (..., H, W) uint8, int32 or int64 indices of T classes; −1, or any other outside 0..T-1, means no class.
        classes: T. unseen: indices of the classes that are not trained on.

    Raises:
        TypeError, ValueError: `labels` are not indices; else as `seen_classes`.
    """
    check_label_maps(labels)
    seen = seen_classes(classes, unseen)
    table = torch.full((classes + 1,), NO_CLASS, device=labels.device)  # its last entry is for no class
    table[seen] = torch.arange(len(seen), device=labels.device)
    labels = labels.long()
    return table[labels.where((labels >= 0) & (labels < classes), classes)]


def seen_classes(classes: int, unseen: Collection[int]) -> list[int]:
    """Indices of the classes trained on, whose text embeddings go with `seen_labels`. Raises ValueError if `unseen`
    repeats a class, is outside 0..T-1, or leaves no class."""
    if len(set(unseen)) < len(unseen) or not set(unseen) <= set(range(classes)) or len(unseen) == classes:
        rule = f"different indices below {classes}, the number of classes, and leave one class to train on"
        raise ValueError(f"unseen must be {rule}, got {tuple(unseen)}.")
    return [index for index in range(classes) if index not in unseen]


@torch.no_grad()
def pseudo_labels(logits: Tensor, labels: Tensor, unseen: Collection[int]) -> Tensor:
    """Labels for transductive training: pixels of any unseen class get the unseen class with the highest logit, all
    others keep their label.

    The published argmax of the sigmoid masks, with those of seen classes set to −1, is the argmax over the unseen
    logits. It is computed tile by tile, so nothing of size (B, T, H, W) is held.

    Args:
        logits: (B, T, h, w) mask logits of all T classes, of any size; resized bilinearly to the labels.
        labels: (B, H, W), as for `seen_labels`. unseen: indices of the classes whose annotations are hidden.

    Returns:
        (B, H, W) int64 labels among all T classes, −1 for no class.

    Raises:
        TypeError, ValueError: logits or labels do not fit; else as `seen_classes`.
    """
    check_tensors("pseudo_labels", logits=(logits, "B T h w"))
    check_label_maps(labels, logits)
    classes = logits.shape[1]
    seen_classes(classes, unseen)
    hidden = torch.tensor(sorted(unseen), dtype=torch.int64, device=logits.device)
    labels = labels.long()
    labels = labels.where((labels >= 0) & (labels < classes), NO_CLASS)
    if not len(hidden):
        return labels
    size = (labels.shape[1], labels.shape[2])
    for index, image in enumerate(logits[:, hidden]):
        guess = ops.label_map(image[None], ops.Placement([(0, 0)], size, size, size))
        labels[index] = torch.where(torch.isin(labels[index], hidden), hidden[guess.long()], labels[index])
    return labels
