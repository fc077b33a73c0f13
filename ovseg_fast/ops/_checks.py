"""Input checks that all operators share: one sentence that names the argument, what came and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensors(operator: str, **arguments: tuple[Tensor, str]) -> None:
    """Check rank, dtype and device of an operator's tensors before any work.

    Each keyword is `name=(tensor, shape)`, the shape in words such as `"B T H W C"`; its word count is the rank. Words
    that are whole numbers are sizes that must match; equal words must have equal sizes throughout the call.

    Raises:
        TypeError: an argument is no tensor, is not floating point, or differs in dtype from the first one.
        ValueError: rank, a named size or the device does not fit.
    """
    sizes: dict[str, tuple[int, str]] = {}
    first: tuple[str, Tensor] | None = None
    for name, (tensor, shape) in arguments.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{operator}: {name} must be a tensor of shape ({_commas(shape)}), got {type(tensor).__name__}."
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{operator}: {name} must be a floating-point tensor, got {tensor.dtype}.")
        if first is None:
            first = (name, tensor)
        elif tensor.device != first[1].device:
            raise ValueError(
                f"{operator}: {name} is on {tensor.device} but {first[0]} is on {first[1].device}; move one of them."
            )
        elif tensor.dtype != first[1].dtype and not torch.is_autocast_enabled(tensor.device.type):
            raise TypeError(
                f"{operator}: {name} is {tensor.dtype} but {first[0]} is {first[1].dtype}; give both one dtype."
            )
        words = shape.split()
        got = tuple(tensor.shape)
        if len(got) != len(words):
            raise ValueError(f"{operator}: {name} must have shape ({_commas(shape)}), got {got}.")
        for word, size in zip(words, got, strict=True):
            expected, owner = sizes.setdefault(word, (int(word) if word.isdigit() else size, name))
            if size != expected:
                source = "" if word.isdigit() else f" as in {owner}"
                raise ValueError(
                    f"{operator}: {name} must be ({_commas(shape)}) with {word} = {expected}{source}, got {got}."
                )


def check_positive(operator: str, **sizes: int) -> None:
    """Refuse sizes below one, such as zero classes or an empty image. Raises ValueError."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{operator}: {name} must be at least 1, got {size}.")


def check_heads(operator: str, heads: int, width: int) -> None:
    """Refuse a head count that does not divide the width. Raises ValueError."""
    if heads < 1 or width % heads:
        raise ValueError(f"{operator}: heads must divide the width {width}, got heads = {heads}.")


def _commas(shape: str) -> str:
    return ", ".join(shape.split())
