"""Upsampling decoder: one stage that doubles the resolution of every class's map under appearance guidance.

    y = [up(x) ; g]                                        up: transposed convolution 2 × 2, stride 2
    y = ReLU(GN(W₁ ∗ y)),   out = ReLU(GN(W₂ ∗ y))         W₁, W₂: 3 × 3 without bias, padding 1

Exact rewrites:
  * W₁ ∗ [up(x) ; g] = W₁ₓ ∗ up(x) + W₁g ∗ g, and g is the same for all classes: its share is computed once an image.
  * up and W₁ₓ follow each other without a non-linearity: one transposed convolution 4 × 4 with stride 2 and padding 1
    does both in half the arithmetic. up's bias ends at the border but W₁ₓ's window does not, so its share is a map,
    which joins the guidance's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .common import registration
from .common.checks import check_positive, check_tensors

EPS = 1e-5  # of both group normalisations, as published


def guidance_term(guidance: Tensor, up_bias: Tensor, conv1_weight: Tensor) -> Tensor:
    """What guidance and the bias of `up` add to the first convolution: the same for all classes.

    Args:
        guidance: (B, 2H, 2W, G) projected appearance guidance at the stage's output resolution.
        up_bias: (U,) bias of the transposed convolution.
        conv1_weight: (D, U + G, 3, 3).

    Returns:
        (B, 2H, 2W, D).

    Raises:
        TypeError, ValueError: dtype, device, rank or widths do not fit.
    """
    shapes = {"guidance": (guidance, "B 2H 2W G"), "up_bias": (up_bias, "U")}
    check_tensors("guidance_term", **shapes, conv1_weight=(conv1_weight, "D U+G 3 3"))
    channels, given = up_bias.shape[0] + guidance.shape[-1], conv1_weight.shape[1]
    if given != channels:
        raise ValueError(f"guidance_term: conv1_weight must have U + G = {channels} input channels, got {given}.")
    check_positive("guidance_term", H=guidance.shape[1], W=guidance.shape[2])
    constant = up_bias.expand(*guidance.shape[:-1], -1)
    maps = torch.cat([constant, guidance], -1).permute(0, 3, 1, 2)
    return F.conv2d(maps, conv1_weight, padding=1).permute(0, 2, 3, 1)


def upsampling_decoder(
    x: Tensor, term: Tensor, up_weight: Tensor, conv1_weight: Tensor, norm1_weight: Tensor, norm1_bias: Tensor,
    conv2_weight: Tensor, norm2_weight: Tensor, norm2_bias: Tensor, *, groups: int, joint_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One stage of the upsampling decoder (CAT-Seg, section 3.4).

    Args:
        x: (B, T, H, W, C).
        term: (B, 2H, 2W, D), `guidance_term` of the same `conv1_weight`.
        up_weight: (C, U, 2, 2), transposed convolution.
        conv1_weight: (D, U + G, 3, 3), of which the first U input channels are used here; conv2_weight: (D, D, 3, 3).
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: (D,), group normalisations.
        groups: groups of both normalisations; divides D (D // 16 as published).
        joint_weight: `joint_kernel(up_weight, conv1_weight)`, if it is at hand.

    Returns:
        (B, T, 2H, 2W, D).

    Raises:
        TypeError, ValueError: a tensor or `groups` does not fit.
    """
    check_tensors(
        "upsampling_decoder", x=(x, "B T H W C"), term=(term, "B 2H 2W D"), up_weight=(up_weight, "C U 2 2"),
        conv1_weight=(conv1_weight, "D U+G 3 3"), norm1_weight=(norm1_weight, "D"), norm1_bias=(norm1_bias, "D"),
        conv2_weight=(conv2_weight, "D D 3 3"), norm2_weight=(norm2_weight, "D"), norm2_bias=(norm2_bias, "D"),
    )  # fmt: skip
    batch, classes, height, width, _ = x.shape
    check_positive("upsampling_decoder", T=classes, H=height, W=width)
    doubled, got = (2 * height, 2 * width), tuple(term.shape[1:3])
    if got != doubled:
        raise ValueError(f"upsampling_decoder: term must be twice the map of x, {doubled}, got {got}.")
    channels, given = up_weight.shape[1], conv1_weight.shape[1]
    if given < channels:
        raise ValueError(f"upsampling_decoder: conv1_weight must have at least U = {channels} inputs, got {given}.")
    if groups < 1 or norm1_weight.numel() % groups:
        raise ValueError(f"upsampling_decoder: groups must divide D = {norm1_weight.numel()}, got {groups}.")

    tensors = (x, term, up_weight, conv1_weight, norm1_weight, norm1_bias, conv2_weight, norm2_weight, norm2_bias)
    backend = backends.choose("upsampling_decoder", *tensors)
    if joint_weight is None:
        joint_weight = joint_kernel(up_weight, conv1_weight)

    if backend == "cpu" and x.shape[-1] % 16 == 0 and norm1_weight.numel() % 16 == 0:
        weights = (joint_weight, norm1_weight, norm1_bias, conv2_weight, norm2_weight, norm2_bias)
        return torch.ops.ovseg_fast.upsampling_decoder_stage(
            *registration.autocast(x, term, *weights), groups, EPS, backend
        )

    def norm(maps: Tensor, term: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        y = maps.permute(0, 2, 3, 1).unflatten(0, (batch, classes))
        if backend == "torch":
            return torch_form(y, term, weight, bias, groups)
        y, term, weight, bias = registration.autocast(y, term, weight, bias)
        return torch.ops.ovseg_fast.guided_group_norm(y, term, weight, bias, groups, EPS, backend)[0]

    maps = F.conv_transpose2d(_maps(x.contiguous()), joint_weight, stride=2, padding=1)
    x = norm(maps, term, norm1_weight, norm1_bias)
    return norm(F.conv2d(_maps(x), conv2_weight, padding=1), None, norm2_weight, norm2_bias)


def logit_map(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution after the last stage: (B, T, H, W, D), (1, D, 3, 3) and (1,) -> (B, T, H, W)."""
    if backends.choose("upsampling_decoder", x, weight, bias) == "cpu" and x.shape[-1] % 2 == 0:
        return torch.ops.ovseg_fast.upsampling_decoder_head(*registration.autocast(x, weight, bias), "cpu")
    return F.conv2d(_maps(x), weight, bias, padding=1).squeeze(1).unflatten(0, x.shape[:2])


def joint_kernel(up_weight: Tensor, conv1_weight: Tensor) -> Tensor:
    """Both convolutions in one: (C, D, 4, 4), whose tap j sums up[a] · conv1[m] over a - m + 2 = j."""
    return F.conv2d(up_weight, conv1_weight[:, : up_weight.shape[1]], padding=2)


def torch_form(y: Tensor, term: Tensor | None, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """What kernels do around the library's convolutions, ReLU(GN(y + term)): y (B, T, H, W, D), term (B, H, W, D)."""
    if term is not None:
        y = y + term.unsqueeze(1)
    maps = _maps(y)
    if not y.requires_grad and (weight.requires_grad or bias.requires_grad):
        maps = maps.contiguous()  # on CPUs torch 2.13 crashes in the backward of channels_last maps without a gradient
    maps = F.relu(F.group_norm(maps, groups, weight, bias, EPS))
    return maps.permute(0, 2, 3, 1).unflatten(0, y.shape[:2])


def _maps(tokens: Tensor) -> Tensor:
    """(B, T, H, W, C) -> (B·T, C, H, W) in PyTorch's channels_last format: the same memory, not copied."""
    return tokens.flatten(0, 1).permute(0, 3, 1, 2)


# Kernels: out like y, and mean and 1 / s of each group, (B, T, groups, 2) in float32, which their backward reads.
registration.define(
    "guided_group_norm(Tensor y, Tensor? term, Tensor weight, Tensor bias, int groups, float eps) -> (Tensor, Tensor)",
    "upsampling_decoder",
    lambda y, term, weight, bias, groups, eps: (y.new_empty(y.shape), y.new_empty(*y.shape[:2], groups, 2).float()),
    saved=(1,),
)

# Only the kernels for CPUs have these two: the whole stage, for channels in multiples of 16, and the last convolution.
registration.define(
    "upsampling_decoder_stage(Tensor x, Tensor term, Tensor joint_weight, Tensor norm1_weight, Tensor norm1_bias, "
    "Tensor conv2_weight, Tensor norm2_weight, Tensor norm2_bias, int groups, float eps) -> Tensor",
    "upsampling_decoder",
    lambda x, term, *_: x.new_empty(*x.shape[:2], *term.shape[1:]),
    differentiable=False,
)
registration.define(
    "upsampling_decoder_head(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    "upsampling_decoder",
    lambda x, *_: x.new_empty(x.shape[:-1]),
    differentiable=False,
)
