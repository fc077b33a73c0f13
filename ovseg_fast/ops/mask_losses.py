"""Mask losses: of low-resolution logits against a label map, at the size of the labels.

With x = resize(logits, (H, W)), p = sigmoid(x), the target y = [label = t], and z = −x where y is 1, x elsewhere:

    bce   = mean over images, classes and pixels of softplus(z)              which is softplus(x) − x·y
    focal = 1/N Σ_bt mean over pixels of α · |p − y|² · softplus(z)          α = 0.25 where y is 1, else 0.75
    dice  = 1/N Σ_bt present · Σ |p − y| / (Σ p + Σ y + 1)                   sums over pixels

and |p − y| is sigmoid(z), so dice is 1 − (2 Σ p·y + 1) / (Σ p + Σ y + 1) without its loss of digits. A class is
present in an image that has a pixel of it; N is the number of such pairs, at least 1. Exact rewrite: targets need no
one-hot form, and the sums over pixels are gathered map by map, so that nothing of size (T, H, W) is held; the backward
pass recomputes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from .common import legacy
from .common.checks import check_integers, check_positive, check_tensors
from .common.tiles import tiles

TERMS = ("bce", "focal", "dice")
SUMS = 5  # Σ of bce, of focal, of |p − y|, of p and of y over an image's pixels, for each class; 0 where not asked for
ALPHA = 0.25  # of the focal loss; its gamma is 2
CHUNK_ELEMENTS = 2**18  # logits at full size that are worked on at a time, or one map: 1 MB in float32, in the cache
LAUNCH = 64  # times as many on a GPU, where a launch costs more than a trip to memory
LARGEST = 2**31  # the kernels place pixels and count half pixels, label rows × rows of them, in 32 bits


def mask_losses(
    logits: Tensor, labels: Tensor, *, terms: Sequence[str] = ("bce",), ignore: int = 255
) -> dict[str, Tensor]:
    """Training losses of mask logits, unweighted: CAT-Seg's is "bce", Cascade-CLIP's are "focal" and "dice".

    Args:
        logits: (B, T, h, w), one map a class, resized bilinearly (corners not aligned) to the size of the labels.
        labels: (B, H, W) class indices in uint8, int32 or int64.
        terms: which losses, of "bce", "focal" and "dice".
        ignore: the label of pixels of no class. Their target is 0 for every class and they still count, as published;
            the same holds for any other label that is not in 0..T-1.

    Returns:
        The losses by name, in the order of `terms`: scalars in float32, or float64 for float64 logits. Sums are kept in
        that precision, under autocast too. All are 0 where there is no image.

    Raises:
        TypeError, ValueError: dtype, device, rank or batch sizes do not fit, there is no class or pixel, or a term is
            unknown, or `ignore` is no whole number.
    """
    check_tensors("mask_losses", logits=(logits, "B T h w"))
    batch, classes, *low = logits.shape
    check_integers("mask_losses", "labels", labels, {"B": batch, "H": None, "W": None}, ("logits", logits))
    size = labels.shape[1:]
    check_positive("mask_losses", T=classes, h=low[0], w=low[1], H=size[0], W=size[1])
    if not terms or len(set(terms)) != len(terms) or not set(terms) <= set(TERMS):
        raise ValueError(f"mask_losses: terms must be some of {', '.join(TERMS)}, each once, got {terms!r}.")
    if not isinstance(ignore, int):
        raise TypeError(f"mask_losses: ignore must be a whole number, got {type(ignore).__name__}.")
    bce, focal, dice = (name in terms for name in TERMS)
    backend = backends.choose("mask_losses", logits, refusals={"triton": _refusal(logits, low, size)})
    if backend == "torch":
        sums = _MaskSums.apply(logits, labels, ignore, bce, focal, dice)
    else:
        sums = torch.ops.ovseg_fast.mask_sums(logits, labels, ignore, bce, focal, dice, backend)
    return _compose(sums, terms, size[0] * size[1])


def _refusal(logits: Tensor, low: Sequence[int], size: Sequence[int]) -> str | None:
    """Why the kernels cannot run this call: they take the logits as they are, whatever autocast says."""
    if logits.dtype not in backends.DTYPES:
        return f"its kernels take float32, float16 and bfloat16, not {str(logits.dtype).removeprefix('torch.')}"
    half_pixels = [(2 * pixels + 1) * (rows + 1) for pixels, rows in zip(size, low, strict=True)]
    if max(*half_pixels, size[0] * size[1], low[0] * low[1]) >= LARGEST:
        return f"resizing {tuple(low)} maps to {tuple(size)} needs more than 31 bits"
    return None


def _compose(sums: Tensor, terms: Sequence[str], pixels: int) -> dict[str, Tensor]:
    """Losses from the sums (B, T, SUMS) over an image's pixels."""
    batch, classes, _ = sums.shape
    bce, focal, difference, probability, count = sums.unbind(-1)
    present = count > 0
    pairs = present.sum().clamp(min=1)
    losses = {}
    for name in terms:
        if name == "bce":
            losses[name] = bce.sum() / max(batch * classes * pixels, 1)
        elif name == "focal":
            losses[name] = focal.sum() / pixels / pairs
        else:
            share = difference / (probability + count + 1)
            losses[name] = torch.where(present, share, 0).sum() / pairs
    return losses


# --- the PyTorch form ---


class _MaskSums(torch.autograd.Function):
    """Sums (B, T, SUMS) over the pixels of each image, for each class."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore: int, bce: bool, focal: bool, dice: bool) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.ignore, ctx.terms = ignore, (bce, focal, dice)
        sums = logits.new_zeros(*logits.shape[:2], SUMS, dtype=_precision(logits))
        with torch.autocast(logits.device.type, enabled=False):
            for image, classes, x, own in _resized(logits, labels, ignore):
                _add_sums(sums[image, classes], x, own, ctx.terms)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels = ctx.saved_tensors
        result = torch.empty_like(logits, memory_format=torch.contiguous_format)
        shape = [1, 0, *logits.shape[2:]]
        with torch.autocast(logits.device.type, enabled=False):
            for image, classes, x, own in _resized(logits, labels, ctx.ignore):
                slope = _slope(grad[image, classes], x, own, ctx.terms)
                shape[1] = len(x)
                result[image, classes] = torch.ops.aten.upsample_bilinear2d_backward(
                    slope[None], list(x.shape[1:]), shape, False, None, None
                )[0]
        return result, None, None, None, None, None


def _precision(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _resized(logits: Tensor, labels: Tensor, ignore: int) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """A few maps at a time: (image, classes, their logits (t, H, W), where the label is theirs (t, H, W))."""
    classes = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
    chunk = CHUNK_ELEMENTS * (1 if logits.device.type == "cpu" else LAUNCH)
    for image, label in enumerate(labels):
        label = label.long()
        label = label.masked_fill(label == ignore, -1)
        for part in tiles(logits.shape[1], max(1, chunk // label.numel())):
            maps = logits[image, part].to(_precision(logits))[None]
            x = F.interpolate(maps, label.shape, mode="bilinear", align_corners=False)[0]
            yield image, part, x, label == classes[part]


def _softplus(z: Tensor) -> Tensor:
    """Accurate for any size of z. It gives NaN for −∞, as PyTorch's own binary cross-entropy does."""
    size = z.abs()
    return size.neg().exp_().log1p_().add_(size.add_(z), alpha=0.5)


def _add_sums(sums: Tensor, x: Tensor, own: Tensor, terms: tuple[bool, bool, bool]) -> None:
    """Write the sums (t, SUMS) of some maps."""
    bce, focal, dice = terms
    z = torch.where(own, -x, x)
    if bce or focal:
        softplus = _softplus(z)
    if bce:
        sums[:, 0] = softplus.sum((1, 2))
    if focal or dice:
        difference = z.sigmoid_()
        sums[:, 4] = own.sum((1, 2))
    if dice:
        sums[:, 2] = difference.sum((1, 2))
        sums[:, 3] = x.sigmoid().sum((1, 2))
    if focal:
        softplus *= difference.square_()
        softplus *= torch.where(own, ALPHA, 1 - ALPHA)
        sums[:, 1] = softplus.sum((1, 2))


def _slope(grad: Tensor, x: Tensor, own: Tensor, terms: tuple[bool, bool, bool]) -> Tensor:
    """Gradient of the resized logits (t, H, W), from that of the sums (t, SUMS)."""
    bce, focal, dice = terms
    by_bce, by_focal, by_difference, by_p, _ = grad[:, :, None, None].unbind(1)
    z = torch.where(own, -x, x)
    q = z.sigmoid()
    total = torch.zeros_like(x)
    if bce:
        total += by_bce * q
    if focal or dice:
        rest = torch.sigmoid(-z)
    if focal:
        total += by_focal * torch.where(own, ALPHA, 1 - ALPHA) * q.square() * (2 * rest * _softplus(z) + q)
    if dice:
        total += by_difference * q * rest
    total = torch.where(own, -total, total)  # so far with respect to z
    if dice:
        total += by_p * q * rest
    return total


# --- registration ---


def _fake(logits: Tensor, labels: Tensor, ignore: int, bce: bool, focal: bool, dice: bool) -> Tensor:
    return logits.new_empty(*logits.shape[:2], SUMS, dtype=torch.float32)


def _backward_fake(
    grad: Tensor, logits: Tensor, labels: Tensor, ignore: int, bce: bool, focal: bool, dice: bool
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, labels, *ctx.options = inputs
    ctx.save_for_backward(logits, labels)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits = torch.ops.ovseg_fast.mask_sums_backward(grad, *ctx.saved_tensors, *ctx.options)
    return logits, *[None] * (1 + len(ctx.options))


legacy.define(
    "mask_sums(Tensor logits, Tensor labels, int ignore, bool bce, bool focal, bool dice, str backend) -> Tensor",
    "mask_losses",
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)
legacy.define(
    "mask_sums_backward(Tensor grad, Tensor logits, Tensor labels, int ignore, bool bce, bool focal, bool dice, "
    "str backend) -> Tensor",
    "mask_losses",
    _backward_fake,
)
