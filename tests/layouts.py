"""The same numbers with other strides."""

from __future__ import annotations

import torch
from torch import Tensor


def transposed(tensor: Tensor) -> Tensor:
    """The same tensor with its storage in the reverse order of axes."""
    axes = tuple(reversed(range(tensor.dim())))
    return tensor.permute(axes).contiguous().permute(axes)


def strided(tensor: Tensor) -> Tensor:
    """The same tensor as every second element of a storage off its beginning, whose other elements are NaN, or
    the largest number among integers."""
    filler = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    storage = tensor.new_full((*tensor.shape, 2), filler)
    storage[..., 1] = tensor
    return storage[..., 1]


LAYOUTS = {"transposed": transposed, "strided": strided}
