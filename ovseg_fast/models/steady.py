"""What a result must not depend on: the mode of the model, the blocks around a call, weights that a cache outlives."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_map

Module = TypeVar("Module", bound=nn.Module)

LARGE = 1 << 20  # elements; smaller tensors are gathered before their bits are summed
COLUMNS = 1021  # of the matrix of int64 that is summed; prime, so that rows of weights do not line up in it


@contextmanager
def undisturbed() -> Iterator[None]:
    """A block without gradients whose tensors are ordinary ones on the CPU, unless a device is given, whatever the
    default device and inference mode are around it."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def without_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast block around the call, or None outside of one."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def in_evaluation(model: Module) -> Module:
    """The model in evaluation mode: itself, or if a part of it trains, a twin that shares its weights and hooks.

    The model's own mode is never touched, as another thread may be using it.
    """
    return _twin(model, {}) if any(module.training for module in _modules(model)) else model


def _twin(module: Any, made: dict[int, nn.Module]) -> Any:
    if id(module) not in made:
        if is_parametrized(module):  # refuses to be copied
            twin = object.__new__(type(module))
            twin.__dict__.update(module.__dict__)
        else:
            twin = copy.copy(module)
        made[id(module)] = twin
        twin.training = False
        children = module._modules.items()
        twin._modules = {name: child if child is None else _twin(child, made) for name, child in children}
    return made[id(module)]


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    """As `module.modules()`, several times as fast, with repeats."""
    stack = [module]
    while stack:
        module = stack.pop()
        yield module
        stack.extend(child for child in module._modules.values() if child is not None)


def parameters(module: nn.Module) -> list[Tensor]:
    return [tensor for part in _modules(module) for tensor in part._parameters.values() if tensor is not None]


def versions(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """Changes with every ordinary write to the tensors, and with their memory, dtype and device; not with writes
    through `.data`."""
    return tuple(
        (tensor.data_ptr(), tensor.dtype, tensor.device, None if tensor.is_inference() else tensor._version)
        for tensor in tensors
    )


@torch.no_grad()
def digest(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Weighted sums of the tensors' bits. A number that changes always changes them; so do two that change places,
    unless they are a multiple of 1021 int64 apart."""
    small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    parts = []
    for tensor in tensors:
        if tensor.numel() >= LARGE and tensor.is_contiguous() and tensor.nbytes % 8 == 0:
            parts.append(tensor.detach().view(-1).view(torch.int64))
        else:
            small.setdefault((tensor.dtype, tensor.device), []).append(tensor.reshape(-1))
    for group in small.values():
        bits = torch.cat(group).view(torch.uint8)
        parts.append(F.pad(bits, (0, -bits.numel() % 8)).view(torch.int64))
    sums = []
    for bits in parts:
        weights = torch.arange(1, 2 * COLUMNS + 1, device=bits.device)
        end = bits.numel() // COLUMNS * COLUMNS
        columns = bits[:end].view(-1, COLUMNS).sum(0)
        sums.append((torch.cat([columns, bits[end:]]) * weights[: COLUMNS + bits.numel() - end]).sum())
    return tuple(torch.stack(sums).tolist()) if sums else ()


def kept(features: Any, dtype: torch.dtype, *, clone: bool = False) -> Any:
    """Features as they are kept: their floating-point tensors in the model's dtype, all of them copies if asked."""

    def keep(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(dtype if value.is_floating_point() else value.dtype, copy=clone)

    return tree_map(keep, features)


def refuse_overflow(model: nn.Module, what: str, dtype: torch.dtype) -> None:
    """Raises FloatingPointError: `what` that came out of the model is not finite."""
    for name, tensor in model.named_parameters():
        if not tensor.isfinite().all():
            cure = "load other weights"
            raise FloatingPointError(f"{what} are NaN or infinite, as are the model's weights in '{name}'; {cure}.")
    cures = {torch.float16: "use bfloat16 or float32", torch.bfloat16: "use float32"}
    cure = cures.get(dtype, "the weights are finite, but too large; load other ones")
    raise FloatingPointError(f"{what} are NaN or infinite, as numbers overflow in {str(dtype)[6:]}; {cure}.")
