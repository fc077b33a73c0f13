"""Mask losses: of low-resolution logits against a label map, at the size of the labels.

With x = resize(logits, (H, W)), p = sigmoid(x), the target y = [label = t], and z = −x where y is 1, x elsewhere:

    bce   = mean over images, classes and pixels of softplus(z)              which is softplus(x) − x·y
    focal = 1/N Σ_bt mean over pixels of α · |p − y|² · softplus(z)          α = 0.25 where y is 1, else 0.75
    dice  = 1/N Σ_bt present · Σ |p − y| / (Σ p + Σ y + 1)                   sums over pixels

and |p − y| is sigmoid(z), so dice is 1 − (2 Σ p·y + 1) / (Σ p + Σ y + 1) without the cancellation. A class is present
in an image that has a pixel of it; N is the number of such pairs, at least 1. Exact rewrite: sums are gathered map by
map without one-hot targets, so nothing of size (T, H, W) is stored; the backward recomputes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from .common import registration
from .common.checks import check_positive, check_tensors
from .common.tiles import tiles

TERMS = ("bce", "focal", "dice")
SUMS = 5  # Σ of bce, of focal, of |p − y|, of p and of y over an image's pixels, for each class; 0 if not asked for
ALPHA = 0.25  # of the focal loss; its gamma is 2
CHUNK_ELEMENTS = 2**18  # full-size logits processed at a time, at least one map: 1 MB in float32, in the cache
GPU_CHUNKS = 64  # times as many on a GPU, where a launch costs more than a trip to memory
LARGEST = 2**31  # the kernels index pixels and half pixels, label rows × rows of them, in 32 bits


def mask_losses(logits: Tensor, labels: Tensor, *, terms: Sequence[str] = ("bce",)) -> dict[str, Tensor]:
    """Training losses of mask logits, unweighted: CAT-Seg's is "bce", Cascade-CLIP's are "focal" and "dice".

    Args:
        logits: (B, T, h, w), one map per class, resized bilinearly (corners not aligned) to the size of the labels.
        labels: (B, H, W) class indices in uint8, int32 or int64. A pixel with another number than 0..T-1 has the target
            0 for every class, and still counts, as published.
        terms: which losses, of "bce", "focal" and "dice".

    Returns:
        The losses by name, in the order of `terms`: scalars, computed under autocast too, in float32, or float64 for
        float64 logits. All are 0 if there is no image.

    Raises:
        TypeError, ValueError: a tensor does not fit, there is no class or pixel, or a term is unknown.
    """
    check_tensors("mask_losses", ("labels",), logits=(logits, "B T h w"), labels=(labels, "B H W"))
    _, classes, *low = logits.shape
    size = labels.shape[1:]
    check_positive("mask_losses", T=classes, h=low[0], w=low[1], H=size[0], W=size[1])
    if not terms or len(set(terms)) != len(terms) or not set(terms) <= set(TERMS):
        raise ValueError(f"mask_losses: terms must be some of {', '.join(TERMS)}, each once, got {terms!r}.")
    wanted = [name in terms for name in TERMS]
    backend = backends.choose("mask_losses", logits, refusals={"triton": _refusal(logits, low, size)})
    if backend == "torch":
        sums = torch_form(logits, labels, *wanted)
    else:
        sums = torch.ops.ovseg_fast.mask_sums(logits, labels, *wanted, backend)
    return _compose(sums, terms, size[0] * size[1])


def _refusal(logits: Tensor, low: Sequence[int], size: Sequence[int]) -> str | None:
    """Why the kernels cannot run this call, or None. They read the logits' own dtype, whatever autocast says."""
    if logits.dtype not in backends.DTYPES:
        return f"its kernels take float32, float16 and bfloat16, not {str(logits.dtype).removeprefix('torch.')}"
    half_pixels = [(2 * pixels + 1) * (rows + 1) for pixels, rows in zip(size, low, strict=True)]
    if max(*half_pixels, size[0] * size[1], low[0] * low[1]) >= LARGEST:
        return f"resizing {tuple(low)} maps to {tuple(size)} needs more than 31 bits"
    return None


def _compose(sums: Tensor, terms: Sequence[str], pixels: int) -> dict[str, Tensor]:
    """Losses from the sums (B, T, SUMS) over an image's pixels."""
    bce, focal, difference, probability, count = sums.unbind(-1)
    present = count > 0
    pairs = present.sum().clamp(min=1)
    losses = {
        "bce": bce.sum() / max(bce.numel() * pixels, 1),
        "focal": focal.sum() / pixels / pairs,
        "dice": torch.where(present, difference / (probability + count + 1), 0).sum() / pairs,
    }
    return {name: losses[name] for name in terms}


def torch_form(logits: Tensor, labels: Tensor, bce: bool, focal: bool, dice: bool) -> Tensor:
    """(B, T, h, w) logits and (B, H, W) labels -> sums (B, T, SUMS) over the pixels of each image, for each class."""
    return _MaskSums.apply(logits, labels, bce, focal, dice)


class _MaskSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, *terms: bool) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.terms = terms
        sums = logits.new_zeros(*logits.shape[:2], SUMS, dtype=_precision(logits))
        with torch.autocast(logits.device.type, enabled=False):
            for image, classes, maps, y in _chunks(logits, labels):
                _add_sums(sums[image, classes], _resize(maps, y), y, *terms)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels = ctx.saved_tensors
        result = torch.empty_like(logits, memory_format=torch.contiguous_format)
        with torch.autocast(logits.device.type, enabled=False):
            for image, classes, maps, y in _chunks(logits, labels):
                slope = _slope(grad[image, classes], _resize(maps, y), y, *ctx.terms)
                result[image, classes] = _resize_backward(slope, maps)
        return result, None, None, None, None


def _precision(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _chunks(logits: Tensor, labels: Tensor) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """A few maps at a time: (image, classes, their logits (t, h, w), their targets y (t, H, W))."""
    classes = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
    chunk = CHUNK_ELEMENTS * (1 if logits.device.type == "cpu" else GPU_CHUNKS)
    for image, label in enumerate(labels):
        for part in tiles(logits.shape[1], max(1, chunk // label.numel())):
            yield image, part, logits[image, part].to(_precision(logits)), label == classes[part]


def _resize(maps: Tensor, y: Tensor) -> Tensor:
    """(t, h, w) -> (t, H, W), the size of y."""
    return F.interpolate(maps[None], y.shape[1:], mode="bilinear", align_corners=False)[0]


def _resize_backward(grad: Tensor, maps: Tensor) -> Tensor:
    """Gradient of `maps` from that of `_resize`'s result."""
    if torch.compiler.is_compiling():  # the operator below takes no symbolic sizes
        return torch.func.vjp(lambda maps: _resize(maps, grad), maps)[1](grad)[0]
    sizes = list(grad.shape[1:]), [1, *maps.shape]
    return torch.ops.aten.upsample_bilinear2d_backward(grad[None], *sizes, False, None, None)[0]


def _softplus(z: Tensor) -> Tensor:
    """log(1 + eᶻ), accurate for any size of z; NaN for −∞, as in PyTorch's own binary cross-entropy."""
    size = z.abs()
    return size.neg().exp_().log1p_().add_(size.add_(z), alpha=0.5)


def _add_sums(sums: Tensor, x: Tensor, y: Tensor, bce: bool, focal: bool, dice: bool) -> None:
    """Write the sums (t, SUMS) of some maps."""
    z = torch.where(y, -x, x)
    if bce or focal:
        softplus = _softplus(z)
    if bce:
        sums[:, 0] = softplus.sum((1, 2))
    if focal or dice:
        difference = z.sigmoid_()
        sums[:, 4] = y.sum((1, 2))
    if dice:
        sums[:, 2] = difference.sum((1, 2))
        sums[:, 3] = x.sigmoid().sum((1, 2))
    if focal:
        softplus *= difference.square_()
        softplus *= torch.where(y, ALPHA, 1 - ALPHA)
        sums[:, 1] = softplus.sum((1, 2))


def _slope(grad: Tensor, x: Tensor, y: Tensor, bce: bool, focal: bool, dice: bool) -> Tensor:
    """Gradient of the resized logits (t, H, W), from that of the sums (t, SUMS)."""
    bce_grad, focal_grad, difference_grad, p_grad, _ = grad[:, :, None, None].unbind(1)
    z = torch.where(y, -x, x)
    q = z.sigmoid()
    slope = torch.zeros_like(x)
    if bce:
        slope += bce_grad * q
    if focal or dice:
        complement = torch.sigmoid(-z)
    if focal:
        inner = 2 * complement * _softplus(z) + q
        slope += focal_grad * torch.where(y, ALPHA, 1 - ALPHA) * q.square() * inner
    if dice:
        slope += difference_grad * q * complement
    slope = torch.where(y, -slope, slope)  # so far with respect to z
    if dice:
        slope += p_grad * q * complement
    return slope


# Kernels: the arguments of `torch_form` -> (B, T, SUMS) in float32.
registration.define(
    "mask_sums(Tensor logits, Tensor labels, bool bce, bool focal, bool dice) -> Tensor",
    "mask_losses",
    lambda logits, labels, *terms: logits.new_empty(*logits.shape[:2], SUMS, dtype=torch.float32),
)
