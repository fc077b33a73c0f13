"""Launcher of `csrc/cpu/layer_gather.cpp`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import native


def layer_gather(hidden: Sequence[Tensor], patches: int, *others: Any) -> Tensor:
    """L tensors (B, N, D) -> (L, B, S, E), or with weights (B, S, E); `others`: (D,) twice, (L, D) twice, (L, D, E),
    weights (L,) or None, and both epsilons."""
    *tensors, shared_eps, norm_eps = others
    projection, weights = tensors[-2:]
    batch, tokens, channels = hidden[0].shape
    layers, width = len(hidden), projection.shape[-1]
    out = hidden[0].new_empty(*([layers] if weights is None else []), batch, patches, width)
    sizes = (layers, batch, tokens, patches, channels, width, *hidden[0].stride()[:2])
    native.call("ovseg_layer_gather_fwd", hidden, *tensors, out, *sizes, shared_eps, norm_eps, kind="cpu")
    return out
