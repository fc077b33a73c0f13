"""Recompute instead of store: for layers whose intermediate results cost more memory than time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from .. import backends


def recomputes(x: Tensor) -> bool:
    """Whether to do so: in training on a CPU. Kernels recompute by themselves, and so may a compiler."""
    plain = x.device.type == "cpu" and not torch.compiler.is_compiling() and backends.requested() != "triton"
    return plain and torch.is_grad_enabled()


class _Call(nn.Module):
    """A method of a module as a module, so that `functional_call` can lend weights to it."""

    def __init__(self, owner: nn.Module, method: Callable[..., Tensor]) -> None:
        super().__init__()
        self.owner, self.method = owner, method

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.method(*tensors)


def recomputed(owner: nn.Module, method: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`method(*tensors)`, of which only `tensors` are stored for the backward pass, which recomputes the rest.

    The method reads the weights of `owner`, no others, and draws no random numbers.
    """
    if not recomputes(tensors[0]):
        return method(*tensors)
    requested = backends.requested()
    call = _Call(owner, method)
    parameters: dict[str, Tensor] = dict(call.named_parameters())  # perhaps lent for the forward pass only

    def run(*tensors: Tensor) -> Tensor:
        return functional_call(call, parameters, tensors)

    # The backward pass may run outside the caller's choice of a backend.
    options: dict[str, Any] = {"context_fn": lambda: (nullcontext(), backends.backend(requested))}
    return checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False, **options)
