"""Input checks that all operators share: one sentence that names the argument, what came and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

LABEL_DTYPES = (torch.uint8, torch.int32, torch.int64)


def check_tensors(operator: str, labels: tuple[str, ...] = (), /, **arguments: tuple[Tensor, str]) -> None:
    """Check dtype, device and shape of an operator's tensors before any work.

    Each keyword is `name=(tensor, shape)`, the shape in words such as `"B T H W C"`: one per axis, integers are sizes,
    and equal words stand for equal sizes throughout the call. All tensors are floating-point numbers of one dtype, but
    those named in `labels` have any of `LABEL_DTYPES`.

    Raises:
        TypeError: an argument is not a tensor, or its dtype does not fit.
        ValueError: rank, a named size or the device does not fit; or a gradient is needed, but a tensor was made under
            inference mode and cannot take part in one.
    """
    sizes: dict[str, tuple[int, str]] = {}
    differentiated = _differentiated(arguments)
    first_name, (first, _) = next(iter(arguments.items()))
    for name, (tensor, shape) in arguments.items():
        words = shape.split()
        axes = ", ".join(words)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operator}: {name} must be a tensor of shape ({axes}), got {type(tensor).__name__}.")
        if name in labels and tensor.dtype not in LABEL_DTYPES:
            raise TypeError(f"{operator}: {name} must be a uint8, int32 or int64 tensor, got {tensor.dtype}.")
        if name not in labels and not tensor.is_floating_point():
            raise TypeError(f"{operator}: {name} must be a floating-point tensor, got {tensor.dtype}.")
        if tensor.device != first.device:
            raise ValueError(
                f"{operator}: {name} is on {tensor.device} but {first_name} is on {first.device}; move one of them."
            )
        one_dtype = name in labels or tensor.dtype == first.dtype
        if not one_dtype and not torch.is_autocast_enabled(tensor.device.type):
            raise TypeError(
                f"{operator}: {name} is {tensor.dtype} but {first_name} is {first.dtype}; give both one dtype."
            )
        if differentiated and tensor.is_inference():
            raise ValueError(
                f"{operator}: {name} was made under torch.inference_mode() and cannot take part in the gradient of "
                f"{differentiated}; pass {name}.clone() or make it under torch.no_grad()."
            )
        got = tuple(tensor.shape)
        if len(got) != len(words):
            raise ValueError(f"{operator}: {name} must have shape ({axes}), got {got}.")
        for word, size in zip(words, got, strict=True):
            expected, owner = sizes.setdefault(word, (int(word) if word.isdigit() else size, name))
            if size != expected:
                source = "" if word.isdigit() else f" as in {owner}"
                raise ValueError(f"{operator}: {name} must be ({axes}) with {word} = {expected}{source}, got {got}.")


def _differentiated(arguments: dict[str, tuple[Tensor, str]]) -> str | None:
    """The first argument that needs a gradient, if any does."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # compilers do not know inference tensors
        return None
    return next((name for name, (x, _) in arguments.items() if isinstance(x, Tensor) and x.requires_grad), None)


def check_positive(operator: str, **sizes: int) -> None:
    """Refuse sizes below one, such as zero classes or an empty image. Raises ValueError."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{operator}: {name} must be at least 1, got {size}.")


def check_heads(operator: str, heads: int, width: int) -> None:
    """Refuse a head count that does not divide the width. Raises ValueError."""
    if heads < 1 or width % heads:
        raise ValueError(f"{operator}: heads must divide the width {width}, got heads = {heads}.")
