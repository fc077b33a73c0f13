"""Launcher of `csrc/cpu/cost_embedding.cpp`."""

from __future__ import annotations

from torch import Tensor

from .. import native


def cost_embedding(image: Tensor, text: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, H, W, E), (T, P, E), (C, P, K, K), (C,) -> (B, T, H, W, C)."""
    classes, prompts, _ = text.shape
    outputs, size = weight.shape[0], weight.shape[-1]
    out = image.new_empty(image.shape[0], classes, *image.shape[1:3], outputs)
    sizes = (*image.shape, classes, prompts, outputs, size)
    native.call("ovseg_cost_embedding_fwd", image, text, weight, bias, out, *sizes, kind="cpu")
    return out
