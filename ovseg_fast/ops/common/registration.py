"""Registration of operators that have kernels as PyTorch custom operators, forward and backward, in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ... import backends

_library = torch.library.Library("ovseg_fast", "FRAGMENT")


def define(
    schema: str,
    operator: str,
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    differentiable: bool = True,
    saved: Sequence[int] = (),
) -> None:
    """Register `ovseg_fast::name`, whose last argument names the backend, and `ovseg_fast::name_backward`.

    The backward takes the gradient of the first output, the saved outputs, all inputs of the forward, and `needs`: for
    each tensor argument whether its gradient is needed. It gives one gradient per tensor argument, like that argument.
    A list of tensors counts as one argument; its gradient is stacked. A `Tensor?` may be None.

    Args:
        schema: `"name(Tensor x, ..., int heads) -> Tensor"`, without the backend.
        operator: names the kernel module, and what `last_backend` reports.
        fake: empty outputs for inputs of a shape; same arguments.
        backward: called with the kernel module before its arguments; by default the module's `name_backward`. What it
            gives where no gradient is needed is dropped, and may be None.
        differentiable: whether the first output has a gradient; no other has one.
        saved: indices of the outputs that the backward reads.
    """
    name, _, rest = schema.partition("(")
    arguments, _, outputs = rest.rpartition(") ->")
    is_tensor = [argument.startswith("Tensor") for argument in arguments.split(", ")]

    def run_forward(*values: Any) -> Any:
        *inputs, backend = values
        return _run(None, name, operator, backend, inputs)

    _register(f"{name}({arguments}, str backend) ->{outputs}", run_forward, lambda *inputs: fake(*inputs[:-1]))
    if not differentiable:
        return

    def run_backward(*values: Any) -> list[Tensor]:
        *inputs, needs, backend = values
        first = _first_tensor(inputs)
        if not any(needs):
            return [first.new_empty(0) for _ in needs]
        gradients = _run(backward, f"{name}_backward", operator, backend, [*inputs, needs])
        pairs = zip(gradients, needs, strict=True)
        return [gradient.contiguous() if need else first.new_empty(0) for gradient, need in pairs]

    def backward_fake(*values: Any) -> list[Tensor]:
        *inputs, needs, _ = values
        tensors = [value for value, tensor in zip(inputs[-len(is_tensor) :], is_tensor, strict=True) if tensor]
        first = _first_tensor(inputs)
        return [_like(value) if need else first.new_empty(0) for value, need in zip(tensors, needs, strict=True)]

    given = ", ".join(["Tensor grad", *(f"Tensor output{index}" for index in saved), arguments])
    _register(f"{name}_backward({given}, bool[] needs, str backend) -> Tensor[]", run_backward, backward_fake)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *values, ctx.backend = inputs
        results = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*results[1:])
        tensors = [results[index] for index in saved]
        ctx.inputs = list(values)  # options stay, tensors are replaced by how many they are
        for position, value in enumerate(values):
            if is_tensor[position]:
                is_list = isinstance(value, (list, tuple))
                ctx.inputs[position] = len(value) if is_list else None
                tensors += value if is_list else [value]
        ctx.save_for_backward(*tensors)

    def run_autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        tensors = list(ctx.saved_tensors)
        results = [tensors.pop(0) for _ in saved]
        inputs = list(ctx.inputs)
        for position, count in enumerate(ctx.inputs):
            if is_tensor[position]:
                inputs[position] = tensors.pop(0) if count is None else [tensors.pop(0) for _ in range(count)]
        needed = [need for need, tensor in zip(ctx.needs_input_grad, is_tensor, strict=False) if tensor]
        needs = [any(need) if isinstance(need, (list, tuple)) else need for need in needed]
        call = getattr(torch.ops.ovseg_fast, f"{name}_backward")
        gradients = iter(call(grad, *results, *inputs, needs, ctx.backend))
        return *(
            _wanted(next(gradients), need) if tensor else None
            for need, tensor in zip(ctx.needs_input_grad, is_tensor, strict=False)
        ), None

    torch.library.register_autograd(f"ovseg_fast::{name}", run_autograd, setup_context=setup_context, lib=_library)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors (or None) in autocast's dtype where it is on: a kernel works on one dtype and sums in float32."""
    device = _first_tensor(tensors).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def _register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"ovseg_fast::{name}", fake, lib=_library)


def _run(function: Callable[..., Any] | None, name: str, operator: str, backend: str, inputs: Sequence[Any]) -> Any:
    device = _first_tensor(inputs).device
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))  # launches go to the tensors' GPU, not the current one
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        kernels = backends.implementation(operator, backend)
        inputs = [_readable(value) for value in inputs]
        return function(kernels, *inputs) if function else getattr(kernels, name)(*inputs)


def _readable(value: Any) -> Any:
    """As kernels read it, copied if need be: a tensor contiguous and beginning at a multiple of 16 bytes; those of a
    list alike, or with equal strides and unit stride over the last axis."""
    if isinstance(value, Tensor):
        value = value.contiguous()
        return value.clone() if value.data_ptr() % 16 else value
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        first = value[0].stride()
        if first[-1] != 1 or any(part.stride() != first or part.data_ptr() % 16 for part in value):
            return [_readable(part) for part in value]
    return value


def _first_tensor(arguments: Sequence[Any]) -> Tensor:
    for argument in arguments:
        first = argument[0] if isinstance(argument, (list, tuple)) and argument else argument
        if isinstance(first, Tensor):
            return first
    raise TypeError("an operator needs at least one tensor")


def _like(value: Any) -> Tensor:
    if isinstance(value, (list, tuple)):
        return value[0].new_empty(len(value), *value[0].shape)
    return value.new_empty(value.shape)


def _wanted(gradient: Tensor, need: Any) -> Any:
    """What autograd takes for one argument: None where nothing is needed, a list for a list."""
    if isinstance(need, (list, tuple)):
        parts = gradient if any(need) else [gradient] * len(need)
        return [part if wanted else None for part, wanted in zip(parts, need, strict=True)]
    return gradient if need else None
