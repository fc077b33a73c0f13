"""What all launchers share: the launch itself, block sizes, and the precision of matrix products."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# Set by the ahead-of-time checks and called instead of a launch, with (kernel, arguments, constants, options).
recorder: Callable[[Any, tuple[Any, ...], dict[str, Any], dict[str, int]], None] | None = None
recorded_generation = 0  # that they compile for, see `generation`


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 2, **constants: Any
) -> None:
    """Launch `kernel` on the current stream without waiting; `constants` are compiled in. An empty grid launches
    nothing; its first axis may have 2³¹ − 1 programs, the others 65,535."""
    options = {"num_warps": warps, "num_stages": stages}
    if all(grid) and recorder is not None:
        recorder(kernel, arguments, constants, options)
    elif all(grid):
        kernel[grid](*arguments, **constants, **options)


@functools.cache
def generation(index: int) -> int:
    """A GPU's newest matrix instructions: 80 for mma.sync (Ampere, Ada, GeForce Blackwell), which keeps operands and
    accumulators in registers, 90 for wgmma (Hopper), 100 for tcgen05 (data-centre Blackwell)."""
    major, _ = torch.cuda.get_device_capability(index)
    return {9: 90, 10: 100, 11: 100}.get(major, 80)


def sizes(table: Mapping[Any, Any], x: Tensor) -> Any:
    """The entry of a table of block sizes for tensors like `x`: by (bytes of an element, `generation`) if the table
    lists that, else by bytes of an element. No autotuning: the first call compiles one variant."""
    size = x.element_size()
    if recorder is not None:
        return table.get((size, recorded_generation), table[size])
    return table.get((size, generation(x.get_device())), table[size]) if x.is_cuda else table[size]  # the interpreter


def block(size: int, least: int = 16, most: int = 128) -> int:
    """The smallest power of two that holds `size`, within `least` (a tensor core's tile) and `most`."""
    return min(most, max(least, 1 << max(size - 1, 0).bit_length()))


def cdiv(size: int, block: int) -> int:
    """Blocks that cover `size`."""
    return -(-size // block)


def precision() -> str:
    """Precision of float32 matrix products, as `torch.set_float32_matmul_precision` sets it."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
