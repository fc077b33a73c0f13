"""The contrastive losses of the tiny CLIP: class tokens or patches against texts."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.catseg import PIXEL_MEAN, PIXEL_STD
from ..models.clip import Block, ImageEncoder

# Of the average over patches. If higher, few patches of a thing learn its name; if lower, those around it do too.
SHARPNESS = 5.0


def encode(visual: ImageEncoder, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, h, w) in 0..255 -> class token (B, E) and value-only dense features (B, S, E), unit length."""
    mean, std = (pixels.new_tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    tokens, _ = visual.embed((pixels - mean) / std, "bicubic")
    *stack, last = (cast(Block, block) for block in visual.transformer.resblocks)
    for block in stack:
        tokens = block(tokens)
    whole, dense = last(tokens)[:, 0], last.dense(tokens)[:, 1:]
    return F.normalize(visual.project(whole), dim=-1), F.normalize(visual.project(dense), dim=-1)


def patch_aligned(dense: Tensor, text: Tensor) -> Tensor:
    """Dense features (B, S, E), texts (T, E), unit length -> similarities (B, T): patches that fit best count most."""
    cosine = torch.einsum("bse,te->bts", dense, text)
    return ((SHARPNESS * cosine).softmax(-1) * cosine).sum(-1)


def soft_contrast(logits: Tensor, right: Tensor) -> Tensor:
    """The contrastive loss if an image may have several right texts, and a text several images.

    Args:
        logits: (S, B). right: (S, B) bool; rows and columns without a right answer do not count.
    """
    losses = []
    for one_way, answers in ((logits, right), (logits.t(), right.t())):
        count = answers.sum(1)
        log = (one_way.log_softmax(1) * answers).sum(1)[count > 0]
        losses.append(-(log / count[count > 0]).mean())
    return (losses[0] + losses[1]) / 2


def near_contrast(logits: Tensor, right: Tensor, near: Tensor) -> Tensor:
    """Each right text of an image against the wrong ones that nearly say the same. In scenes `soft_contrast` rarely
    needs the last word of a class: few show the same colour and pattern.

    Args:
        logits: (S, T). right: (S, T) bool. near: (T, N) indices of each text's neighbours, itself first.
    """
    wrong_or_self = ~right[:, near]
    wrong_or_self[..., 0] = True
    among = logits[:, near].masked_fill(~wrong_or_self, -torch.inf).log_softmax(-1)
    return -among[..., 0][right].mean()
