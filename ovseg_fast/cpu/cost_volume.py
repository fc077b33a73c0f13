"""Launcher of `csrc/cpu/cost_volume.cpp`."""

from __future__ import annotations

from torch import Tensor

from .. import native


def cost_volume(image: Tensor, text: Tensor) -> Tensor:
    """(B, H, W, E) and (T, P, E) -> (B, T, P, H, W)."""
    batch, height, width, channels = image.shape
    classes, prompts, _ = text.shape
    cost = image.new_empty(batch, classes, prompts, height, width)
    sizes = (batch, height * width, classes * prompts, channels)
    native.call("ovseg_cost_volume_fwd", image, text, cost, *sizes, kind="cpu")
    return cost
