"""Input checks that all operators share: one sentence that names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

INTEGERS = (torch.uint8, torch.int32, torch.int64)  # dtypes of labels


def check_tensors(operator: str, **arguments: tuple[Tensor, str]) -> None:
    """Check rank, dtype and device of an operator's tensors before any work.

    Each keyword is `name=(tensor, shape)`, the shape in words such as `"B T H W C"`; its word count is the rank. Words
    that are whole numbers are sizes that must match; equal words must have equal sizes throughout the call.

    Raises:
        TypeError: an argument is no tensor, is not floating point, or differs in dtype from the first one.
        ValueError: rank, a named size or the device does not fit; or gradients are wanted through a tensor that was
            made under inference mode and can have none.
    """
    sizes: dict[str, tuple[int, str]] = {}
    needs_gradient = None
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # compilers do not know of inference tensors
        needs_gradient = next(
            (name for name, (tensor, _) in arguments.items() if isinstance(tensor, Tensor) and tensor.requires_grad),
            None,
        )
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
        if needs_gradient and tensor.is_inference():
            raise ValueError(
                f"{operator}: {name} was made under torch.inference_mode() and cannot take part in the gradient of "
                f"{needs_gradient}; pass {name}.clone() or make it under torch.no_grad()."
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


def check_integers(
    operator: str, name: str, tensor: Tensor, sizes: Mapping[str, int | None], like: tuple[str, Tensor]
) -> None:
    """Check a tensor of indices: an integer dtype, one axis for each of `sizes` (None: any size), the device of `like`.

    Raises:
        TypeError: it is no tensor, or neither uint8 nor int32 nor int64.
        ValueError: rank, a size or the device does not fit.
    """
    shape = ", ".join(sizes)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{operator}: {name} must be a tensor of shape ({shape}), got {type(tensor).__name__}.")
    if tensor.dtype not in INTEGERS:
        raise TypeError(f"{operator}: {name} must be a uint8, int32 or int64 tensor, got {tensor.dtype}.")
    if tensor.device != like[1].device:
        raise ValueError(
            f"{operator}: {name} is on {tensor.device} but {like[0]} is on {like[1].device}; move one of them."
        )
    got = tuple(tensor.shape)
    if len(got) != len(sizes):
        raise ValueError(f"{operator}: {name} must have shape ({shape}), got {got}.")
    for (word, expected), size in zip(sizes.items(), got, strict=True):
        if expected is not None and size != expected:
            raise ValueError(
                f"{operator}: {name} must be ({shape}) with {word} = {expected} as in {like[0]}, got {got}."
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
