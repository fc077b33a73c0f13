"""Training losses of both methods, with logits at full size and one-hot targets.

CAT-Seg: arXiv 2303.11797; Cascade-CLIP: arXiv 2406.00670.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layers import resize


def one_hot_targets(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """labels (B, H, W) -> (B, T, H, W), all zero if the label is no class."""
    nothing = (labels < 0) | (labels >= classes)
    hot = F.one_hot(labels.long().masked_fill(nothing, classes), classes + 1)
    return hot[..., :classes].permute(0, 3, 1, 2).to(dtype)


def catseg_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy, mean over everything: logits (B, T, h, w), labels (B, H, W)."""
    x = resize(logits, labels.shape[1:])
    return F.binary_cross_entropy_with_logits(x, one_hot_targets(labels, x.shape[1], x.dtype))


def cascade_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Focal and dice loss without their weights: logits (B, T, h, w), labels (B, H, W)."""
    x = resize(logits, labels.shape[1:])
    target = one_hot_targets(labels, x.shape[1], x.dtype)
    p = torch.sigmoid(x)
    present = target.flatten(2).amax(dim=2)
    masks = present.sum().clamp(min=1)
    focal = F.binary_cross_entropy_with_logits(x, target, reduction="none")
    focal = focal * torch.where(target > 0, 0.25 * (1 - p) ** 2, 0.75 * p**2)
    overlap, total = (p * target).flatten(2).sum(2), p.flatten(2).sum(2) + target.flatten(2).sum(2)
    dice = (1 - (2 * overlap + 1) / (total + 1))[present > 0]
    return focal.flatten(2).mean(2).sum() / masks, dice.sum() / masks
