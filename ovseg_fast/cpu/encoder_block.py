"""Launcher of `csrc/cpu/encoder_block.cpp`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import native


def encoder_block(x: Tensor, *others: Any) -> Tensor:
    """(B, N, D) -> the same; `others`: weights, heads, quick, dense and both epsilons."""
    *weights, heads, quick, dense, norm1_eps, norm2_eps = others
    out = x.new_empty(x.shape)
    sizes = (*x.shape, len(weights[-3]), heads, int(quick), int(dense))  # weights[-3] is b₁
    native.call("ovseg_encoder_block_fwd", x, *weights, out, *sizes, norm1_eps, norm2_eps, kind="cpu")
    return out
