"""Upsampling decoder: one stage that doubles the resolution of every class's map under appearance guidance.

    y = [up(x) ; g]                                        up: transposed convolution 2 × 2, stride 2
    y = ReLU(GN(W₁ ∗ y)),   out = ReLU(GN(W₂ ∗ y))         W₁, W₂: 3 × 3 without bias, padding 1

Exact rewrites:
  * W₁ ∗ [up(x) ; g] = W₁ₓ ∗ up(x) + W₁g ∗ g, and g is the same for all classes: its share is computed once an image.
  * up and W₁ₓ follow each other without a non-linearity, so both together are one transposed convolution 4 × 4 with
    stride 2 and padding 1, which halves the arithmetic of the two. up's bias does not reach beyond the border while
    W₁ₓ's window does, so its share is a map, not a constant; it joins the guidance's share.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .common import legacy, registration
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
    check_tensors(
        "guidance_term",
        guidance=(guidance, "B 2H 2W G"),
        up_bias=(up_bias, "U"),
        conv1_weight=(conv1_weight, "D U+G 3 3"),
    )
    if conv1_weight.shape[1] != up_bias.shape[0] + guidance.shape[-1]:
        raise ValueError(
            f"guidance_term: conv1_weight must have U + G = {up_bias.shape[0] + guidance.shape[-1]} input channels, "
            f"got {conv1_weight.shape[1]}."
        )
    check_positive("guidance_term", H=guidance.shape[1], W=guidance.shape[2])
    constant = up_bias.expand(*guidance.shape[:-1], -1)
    maps = torch.cat([constant, guidance], -1).permute(0, 3, 1, 2)
    return F.conv2d(maps, conv1_weight, padding=1).permute(0, 2, 3, 1)


def upsampling_decoder(
    x: Tensor,
    term: Tensor,
    up_weight: Tensor,
    conv1_weight: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    conv2_weight: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    *,
    groups: int,
    joint_weight: Tensor | None = None,
) -> Tensor:
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
        "upsampling_decoder",
        x=(x, "B T H W C"),
        term=(term, "B 2H 2W D"),
        up_weight=(up_weight, "C U 2 2"),
        conv1_weight=(conv1_weight, "D U+G 3 3"),
        norm1_weight=(norm1_weight, "D"),
        norm1_bias=(norm1_bias, "D"),
        conv2_weight=(conv2_weight, "D D 3 3"),
        norm2_weight=(norm2_weight, "D"),
        norm2_bias=(norm2_bias, "D"),
    )
    batch, classes, height, width, _ = x.shape
    check_positive("upsampling_decoder", T=classes, H=height, W=width)
    if term.shape[1:3] != (2 * height, 2 * width):
        raise ValueError(
            f"upsampling_decoder: term must be twice the map of x, {2 * height} × {2 * width}, "
            f"got {tuple(term.shape[1:3])}."
        )
    if conv1_weight.shape[1] < up_weight.shape[1]:
        raise ValueError(
            f"upsampling_decoder: conv1_weight must have at least U = {up_weight.shape[1]} input channels, "
            f"got {conv1_weight.shape[1]}."
        )
    if groups < 1 or norm1_weight.numel() % groups:
        raise ValueError(f"upsampling_decoder: groups must divide D = {norm1_weight.numel()}, got {groups}.")

    tensors = (x, term, up_weight, conv1_weight, norm1_weight, norm1_bias, conv2_weight, norm2_weight, norm2_bias)
    backend = backends.choose("upsampling_decoder", *tensors)
    if joint_weight is None:
        joint_weight = joint_kernel(up_weight, conv1_weight)
    # The tokens are maps in PyTorch's channels_last format: neither library nor kernels copy them.
    maps = x.contiguous().flatten(0, 1).permute(0, 3, 1, 2)
    maps = F.conv_transpose2d(maps, joint_weight, stride=2, padding=1)
    maps = _guided_group_norm(maps, term, norm1_weight, norm1_bias, (batch, classes), groups, backend)
    maps = F.conv2d(maps, conv2_weight, padding=1)
    maps = _guided_group_norm(maps, None, norm2_weight, norm2_bias, (batch, classes), groups, backend)
    return maps.permute(0, 2, 3, 1).unflatten(0, (batch, classes))


def joint_kernel(up_weight: Tensor, conv1_weight: Tensor) -> Tensor:
    """Both convolutions in one: (C, D, 4, 4), whose tap j sums up[a] · conv1[m] over a - m + 2 = j."""
    return F.conv2d(up_weight, conv1_weight[:, : up_weight.shape[1]], padding=2)


def _guided_group_norm(
    maps: Tensor, term: Tensor | None, weight: Tensor, bias: Tensor, sizes: tuple[int, int], groups: int, backend: str
) -> Tensor:
    """ReLU(GN(maps + term)) of maps (B·T, D, H, W) and term (B, H, W, D) or None; `sizes` are B and T."""
    if backend == "torch":
        if term is not None:
            maps = (maps.unflatten(0, sizes) + term.permute(0, 3, 1, 2).unsqueeze(1)).flatten(0, 1)
        return F.relu(F.group_norm(maps, groups, weight, bias, EPS))
    tokens = maps.permute(0, 2, 3, 1).unflatten(0, sizes)
    if term is None:
        tokens, weight, bias = registration.autocast(tokens, weight, bias)
    else:
        tokens, weight, bias, term = registration.autocast(tokens, weight, bias, term)
    out, _ = torch.ops.ovseg_fast.guided_group_norm(tokens, term, weight, bias, groups, EPS, backend)
    return out.flatten(0, 1).permute(0, 3, 1, 2)


# --- kernels: y (B, T, H, W, D), term (B, H, W, D) -> out like y; mean and 1 / s of each group, (B, T, groups, 2) ---


def _fake(
    y: Tensor, term: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(*y.shape[:2], groups, 2, dtype=torch.float32)


def _backward_fake(
    grad: Tensor,
    y: Tensor,
    term: Tensor | None,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    need_y: bool,
    need_term: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    term_shape = (y.shape[0], *y.shape[2:])
    shapes = (y.shape, need_y), (term_shape, need_term), (weight.shape, need_affine), (bias.shape, need_affine)
    y_grad, term_grad, weight_grad, bias_grad = (y.new_empty(shape if need else 0) for shape, need in shapes)
    return y_grad, term_grad, weight_grad, bias_grad


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, term, weight, bias, _, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(y, term, output[1], weight, bias)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:4]
    y, term, weight, bias = needed
    gradients = torch.ops.ovseg_fast.guided_group_norm_backward(
        grad, *ctx.saved_tensors, y, term, weight or bias, ctx.backend
    )
    return *(gradient if need else None for gradient, need in zip(gradients, needed, strict=True)), None, None, None


legacy.define(
    "guided_group_norm(Tensor y, Tensor? term, Tensor weight, Tensor bias, int groups, float eps, str backend) "
    "-> (Tensor, Tensor)",
    "upsampling_decoder",
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)
legacy.define(
    "guided_group_norm_backward(Tensor grad, Tensor y, Tensor? term, Tensor statistics, Tensor weight, Tensor bias, "
    "bool need_y, bool need_term, bool need_affine, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    "upsampling_decoder",
    _backward_fake,
)
