"""Work through one axis of a large tensor in tiles.

On a CPU the cost of a class doubles once the tensors of all classes leave the cache, so the PyTorch forms take a few
classes at a time. A GPU takes all at once: there a launch costs more than a trip to memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .threads import run_pieces, threads_for

# Tokens per tile, which one thread works through: with 512 channels, the widest activation, about 2 MB in float32.
# Measured flat between 1,152 and 2,304 on cores with 1 MB of second-level cache; more tiles are shared out more evenly.
TILE_TOKENS = 1152


def tile_size(total: int, tokens_each: int, device: torch.device) -> int:
    """How many of `total` items of `tokens_each` tokens make a tile: all of them on a GPU and when compiling.

    Tiles are as equal as can be, and do not depend on the number of threads: so neither do their results.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        return max(total, 1)
    size = max(1, min(total, TILE_TOKENS // max(tokens_each, 1)))
    return max(1, -(-total // max(1, -(-total // size))))


def tiles(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `range(total)`."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def map_tiles(function: Callable[[Tensor], Tensor], x: Tensor, dim: int, size: int, *others: Tensor) -> Tensor:
    """Apply a shape-preserving function, which also reads `others`, to tiles of `x` along `dim`; without gradients on
    several threads, one to a tile."""
    if x.shape[dim] <= size:
        return function(x)
    parts = x.split(size, dim)
    if torch.is_grad_enabled():
        return torch.cat([function(part) for part in parts], dim)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    places = out.split(size, dim)

    def fill(index: int) -> None:
        places[index].copy_(function(parts[index]))

    run_pieces(fill, range(len(parts)), threads_for(x, *others))
    return out
