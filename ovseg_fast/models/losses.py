"""Training losses that the methods share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed

from .. import ops
from ..ops.common.checks import LABEL_DTYPES

PER_MASK = {"focal", "dice"}  # terms that are divided by the number of ground-truth masks


def check_label_maps(labels: Tensor, images: Tensor | None = None) -> None:
    """Check class indices before the encoders run: of any shape, or (B, H, W) for `images` (B, 3, h, w).

    Raises:
        TypeError: `labels` is not a tensor of uint8, int32 or int64.
        ValueError: another shape, a size of zero, or another device.
    """
    if not isinstance(labels, Tensor) or labels.dtype not in LABEL_DTYPES:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a uint8, int32 or int64 tensor of class indices, got {got}.")
    if images is None:
        return
    if labels.dim() != 3 or len(labels) != len(images) or 0 in labels.shape:
        raise ValueError(
            f"labels must have shape (B, H, W) with B = {len(images)} as in images and no size zero, "
            f"got {tuple(labels.shape)}."
        )
    if labels.device != images.device:
        raise ValueError(f"labels are on {labels.device} but images are on {images.device}; move one of them.")


def weighted_losses(logits: Tensor, labels: Tensor, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Terms of `ops.mask_losses` times their weights, by name, and their sum "loss".

    Terms per mask are divided by the mean number of masks over all processes.
    """
    terms = ops.mask_losses(logits, labels, terms=tuple(weights))
    if PER_MASK & terms.keys() and (share := share_of_masks(labels, logits.shape[1])) is not None:
        terms |= {name: terms[name] * share for name in PER_MASK & terms.keys()}
    losses = {name: weight * terms[name] for name, weight in weights.items()}
    return losses | {"loss": torch.stack(list(losses.values())).sum()}


def share_of_masks(labels: Tensor, classes: int) -> Tensor | None:
    """N / N̄: this process's ground-truth masks over their mean among all processes, both at least 1.

    A mask is a pair of an image and a class in it. A loss that was divided by N, times this, is divided by N̄, so the
    mean over processes is the loss of all their images together. None with one process.
    """
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    labels = labels.long().flatten(1)
    labels = labels.where((labels >= 0) & (labels < classes), classes)
    present = torch.zeros(len(labels), classes + 1, dtype=torch.bool, device=labels.device).scatter_(1, labels, True)
    masks = present[:, :classes].sum().float()
    mean = masks.clone()
    distributed.all_reduce(mean)
    mean /= distributed.get_world_size()
    return masks.clamp(min=1) / mean.clamp(min=1)
