"""What all launchers share: the launch itself, block sizes, and the precision of matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Set by the ahead-of-time checks: called instead of a launch, with (kernel, arguments, constants, options).
recorder: Callable[[Any, tuple[Any, ...], dict[str, Any], dict[str, int]], None] | None = None


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 2, **constants: Any
) -> None:
    """Launch `kernel` on the current stream without waiting; nothing where the grid is empty.

    `arguments` are tensors and numbers known at the call, `constants` are compiled in. The first axis of the grid may
    have 2³¹ − 1 programs, the others 65,535.
    """
    options = {"num_warps": warps, "num_stages": stages}
    if not all(grid):
        return
    if recorder is not None:
        recorder(kernel, arguments, constants, options)
        return
    kernel[grid](*arguments, **constants, **options)


def block(size: int, least: int = 16, most: int = 128) -> int:
    """The smallest power of two that holds `size`, within `least` (a tensor core's tile) and `most`."""
    return min(most, max(least, 1 << max(size - 1, 0).bit_length()))


def cdiv(size: int, block: int) -> int:
    """Blocks that cover `size`."""
    return -(-size // block)


def precision() -> str:
    """Precision of float32 matrix products, as PyTorch's own are set: `torch.set_float32_matmul_precision`."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
