"""Launcher of `csrc/cpu/spatial_aggregation.cpp`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import native


def spatial_aggregation(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """(B, T, H, W, C) -> the same, and an empty tensor; `others`: terms, weights, heads, window, shift, False."""
    *tensors, heads, window, shift, _ = others
    out = x.new_empty(x.shape)
    sizes = (*x.shape, len(tensors[-3]), heads, window, shift)  # tensors[-3] is b₁
    native.call("ovseg_spatial_aggregation_fwd", x, *tensors, out, None, *sizes, kind="cpu")
    return out, x.new_empty(0)
