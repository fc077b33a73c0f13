"""Launchers of `csrc/cpu/upsampling_decoder.cpp`, `upsampling_decoder_stage.cpp` and `upsampling_decoder_head.cpp`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native


def guided_group_norm(
    y: Tensor, term: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """(B, T, H, W, D) and (B, H, W, D) -> out (B, T, H, W, D), and mean and 1 / s of each group, (B, T, groups, 2)."""
    batch, classes, height, width, channels = y.shape
    out = y.new_empty(y.shape)
    statistics = y.new_empty(batch, classes, groups, 2, dtype=torch.float32)
    sizes = (batch, classes, height * width, channels, groups, 0)  # no chunk, as no moments
    native.call(
        "ovseg_upsampling_decoder_norm_fwd", y, term, weight, bias, out, statistics, None, *sizes, eps, kind="cpu"
    )
    return out, statistics


def upsampling_decoder_stage(x: Tensor, term: Tensor, *others: Any) -> Tensor:
    """(B, T, H, W, C) -> (B, T, 2H, 2W, D); `others`: up and the weights around the second convolution, groups, eps."""
    *weights, groups, eps = others
    batch, classes, height, width, channels = x.shape
    outputs = term.shape[-1]
    out = x.new_empty(batch, classes, 2 * height, 2 * width, outputs)
    sizes = (batch, classes, height, width, channels, outputs, groups)
    native.call("ovseg_upsampling_decoder_stage_fwd", x, term, *weights, out, *sizes, eps, kind="cpu")
    return out


def upsampling_decoder_head(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, T, H, W, D), (1, D, 3, 3) and (1,) -> (B, T, H, W)."""
    batch, classes, height, width, channels = x.shape
    out = x.new_empty(batch, classes, height, width)
    sizes = (batch * classes, height, width, channels)
    native.call("ovseg_upsampling_decoder_head_fwd", x, weight, bias, out, *sizes, kind="cpu")
    return out
