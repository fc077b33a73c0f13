"""Recompute instead of store: for layers whose intermediate results take more memory than time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from .. import backends


def recomputes(x: Tensor) -> bool:
    """Whether to work that way: in training on a CPU. Kernels recompute by themselves, and so may a compiler."""
    plain = x.device.type == "cpu" and not torch.compiler.is_compiling() and backends.requested() != "triton"
    return plain and torch.is_grad_enabled()


def recomputed(module: nn.Module, *tensors: Tensor) -> Tensor:
    """`module(*tensors)`, of which a later backward pass finds only `tensors` stored and works out the rest again.

    The module must draw no random numbers.
    """
    if not recomputes(tensors[0]):
        return module(*tensors)
    requested = backends.requested()
    # Those of now: torch.func.functional_call may have lent them to the module for the forward pass only.
    parameters: dict[str, Tensor] = dict(module.named_parameters())

    def run(*tensors: Tensor) -> Tensor:
        return functional_call(module, parameters, tensors)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), backends.backend(requested)  # the backward pass may run outside the caller's choice

    return checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
