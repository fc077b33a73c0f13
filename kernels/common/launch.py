"""What all launchers share: the launch itself, block sizes, and the precision of matrix products."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Sizes = TypeVar("Sizes")

# Set by the ahead-of-time checks: called instead of a launch, with (kernel, arguments, constants, options).
recorder: Callable[[Any, tuple[Any, ...], dict[str, Any], dict[str, int]], None] | None = None
recorded_generation = 0  # which GPUs they compile for, see `generation`


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


@functools.cache
def generation(index: int) -> int:
    """The youngest matrix instructions of a GPU: 80 for mma.sync (Ampere, Ada, GeForce Blackwell), whose sums a thread
    keeps in registers next to the operands, 90 for Hopper's wgmma, 100 for tcgen05 (data-centre Blackwell)."""
    major, _ = torch.cuda.get_device_capability(index)
    return {9: 90, 10: 100, 11: 100}.get(major, 80)


def sizes(table: Mapping[Any, Sizes], x: Tensor) -> Sizes:
    """The entry of a table of block sizes for tensors like `x`: by bytes of an element, or by (bytes of an element,
    `generation`) where a generation has one of its own. No search: the first call compiles one variant."""
    size = x.element_size()
    if x.is_cuda or recorder is not None:
        own = (size, generation(x.get_device()) if recorder is None else recorded_generation)
        return table.get(own, table[size])
    return table[size]  # Triton's interpreter


def block(size: int, least: int = 16, most: int = 128) -> int:
    """The smallest power of two that holds `size`, within `least` (a tensor core's tile) and `most`."""
    return min(most, max(least, 1 << max(size - 1, 0).bit_length()))


def cdiv(size: int, block: int) -> int:
    """Blocks that cover `size`."""
    return -(-size // block)


def precision() -> str:
    """Precision of float32 matrix products, as PyTorch's own are set: `torch.set_float32_matmul_precision`."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
