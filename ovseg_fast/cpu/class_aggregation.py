"""Launchers of `csrc/cpu/class_aggregation.cpp` and `class_aggregation_resize.cpp`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import native


def class_aggregation(x: Tensor, terms: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """(B, T, H, W, C) -> the same, and an empty tensor; `others`: weights, pads, heads, pooling, False, False."""
    *weights, pads, heads, pooling, full, _ = others
    if full:
        raise NotImplementedError("the CPU kernels take linear attention only")
    batch, classes, height, width, channels = x.shape
    y = x.new_empty(batch, classes, height // pooling, width // pooling, channels)
    sizes = (*x.shape, len(weights[-3]), heads, pooling, pads, len(terms))  # weights[-3] is b₁
    native.call("ovseg_class_aggregation_fwd", x, terms, *weights, y, None, *sizes, kind="cpu")
    if pooling == 1:  # x is added already
        return y, x.new_empty(0)
    out = x.new_empty(x.shape)
    sizes = (batch * classes, height, width, *y.shape[2:])
    native.call("ovseg_class_aggregation_resize_fwd", x, y, out, *sizes, kind="cpu")
    return out, x.new_empty(0)
