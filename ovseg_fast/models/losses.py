"""What the training losses of both methods share."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

NO_CLASS = -1
DTYPES = (torch.uint8, torch.int32, torch.int64)


def check_labels(labels: Tensor, images: Tensor) -> None:
    """Check label maps (B, H, W) of images (B, 3, h, w), before the encoders run; their sizes in pixels may differ.

    Raises:
        TypeError: `labels` is no tensor of uint8, int32 or int64.
        ValueError: another shape, a size of zero, or on another device.
    """
    if not isinstance(labels, Tensor) or labels.dtype not in DTYPES:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a uint8, int32 or int64 tensor of class indices, got {got}.")
    if labels.dim() != 3 or len(labels) != len(images) or 0 in labels.shape:
        raise ValueError(
            f"labels must have shape (B, H, W) with B = {len(images)} as in images and no size zero, "
            f"got {tuple(labels.shape)}."
        )
    if labels.device != images.device:
        raise ValueError(f"labels are on {labels.device} but images are on {images.device}; move one of them.")


def share_of_masks(labels: Tensor, classes: int) -> Tensor | None:
    """N / N̄, this process's ground-truth masks over their mean among all processes; both are at least 1.

    A mask is a pair of an image and a class that it shows. Times this, a loss that was divided by N is one divided by
    N̄, so that the mean over processes is the loss of all their images together. None where there is one process only.
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
