"""Registration of kernel-backed operators with PyTorch's dispatcher, in one place.

Every one is a custom operator `ovseg_fast::name` whose last argument names the backend. Its fake lets compilers see
shapes without running it; its autograd formula calls another custom operator, `name_backward`, in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from ... import backends
from .registration import _first_tensor, _library


def define(
    schema: str,
    operator: str,
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Register `ovseg_fast::name`, whose kernel launcher is the function `name` of the operator's kernel module.

    Args:
        schema: `"name(Tensor x, ..., str backend) -> Tensor"`.
        operator: the operator that it is part of; names the kernel module.
        fake: gives empty outputs for inputs of a shape; the same arguments without `backend`.
        backward, setup_context: autograd formula, as `torch.library.register_autograd` takes them.
    """
    name = schema.partition("(")[0]

    def run(*arguments: Any) -> Any:
        *inputs, backend = arguments
        device = _first_tensor(inputs).device
        with ExitStack() as stack:
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))  # launches go to the tensors' GPU, not the current one
            if torch.is_autocast_enabled(device.type):
                stack.enter_context(torch.autocast(device.type, enabled=False))
            return getattr(backends.implementation(operator, backend), name)(*inputs)

    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"ovseg_fast::{name}", lambda *arguments: fake(*arguments[:-1]), lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"ovseg_fast::{name}", backward, setup_context=setup_context, lib=_library)
