"""Launcher of `csrc/cpu/gaussian_aggregation.cpp`."""

from __future__ import annotations

from torch import Tensor

from .. import native


def gaussian_aggregation(features: Tensor, weights: Tensor) -> Tensor:
    """(L, B, S, E) and (L,) -> (B, S, E)."""
    out = features.new_empty(features.shape[1:])
    sizes = (len(features), out.numel())
    native.call("ovseg_gaussian_aggregation_fwd", features, weights, out, *sizes, kind="cpu")
    return out
