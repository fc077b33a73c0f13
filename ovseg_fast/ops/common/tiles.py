"""Work through one axis of a large tensor in tiles.

On a CPU the cost of a class doubles once the tensors of all classes leave the cache, so the PyTorch forms take a few
classes at a time. A GPU takes all at once: there a launch costs more than a trip to memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Tokens per tile: with 512 channels, the widest activation, about 4 MB in float32, near the second-level caches of two
# cores. Measured flat between 1,152 and 4,608 on such a machine.
TILE_TOKENS = 2304


def tile_size(total: int, tokens_each: int, device: torch.device) -> int:
    """How many of `total` items of `tokens_each` tokens make a tile: all of them on a GPU and when compiling."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return max(total, 1)
    return max(1, min(total, TILE_TOKENS // max(tokens_each, 1)))


def tiles(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `range(total)`."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def map_tiles(function: Callable[[Tensor], Tensor], x: Tensor, dim: int, size: int) -> Tensor:
    """Apply a shape-preserving function to tiles of `x` along `dim`."""
    if x.shape[dim] <= size:
        return function(x)
    parts = (function(part) for part in x.split(size, dim))
    if torch.is_grad_enabled():
        return torch.cat(list(parts), dim)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for part, into in zip(parts, out.split(size, dim), strict=True):
        into.copy_(part)
    return out
