"""What is computed from weights alone, once per version of the weights instead of in each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


class Prepared(nn.Module):
    """Remembers the last result of each function: `prepared(function, *tensors)` gives `function(*tensors)`.

    A result is reused if every tensor has the same address, version, dtype, device and layout as then, under the same
    autocast and inference mode; on a CPU the contents are compared too. On a GPU a write through `.data`, which does
    not raise a tensor's version, goes unnoticed here; a `Segmenter` notices it. After one, call `train()` or `eval()`
    before you call the model yourself.

    Nothing is remembered if a gradient is needed, while compiling, tracing or capturing a CUDA graph, in `torch.func`
    or forward-mode transforms, or for inference tensors on a GPU, which have no version. `train`, `eval`,
    `load_state_dict`, `to` and the like forget all; copies and pickles start empty.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[Callable[..., Tensor], tuple[tuple[Any, ...], list[Tensor], Tensor]] = {}

    def forward(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        if not _may_remember(tensors):
            return function(*tensors)
        on_cpu, key = self.compares(tensors[0].device), _key(tensors)
        old_key, kept, result = self.entries.get(function, (None, [], tensors[0]))
        if key == old_key and not (on_cpu and any(not torch.equal(*pair) for pair in zip(tensors, kept, strict=True))):
            return result
        # Copies to compare with; on a GPU views, so that no other tensor can take over the address.
        kept = [tensor.detach().clone() if on_cpu else tensor.detach() for tensor in tensors]
        result = function(*tensors)
        self.entries[function] = key, kept, result
        return result

    @staticmethod
    def compares(device: torch.device) -> bool:
        """Whether the contents of tensors on that device are compared."""
        return device.type == "cpu"

    def train(self, mode: bool = True) -> Prepared:
        self.entries.clear()
        return super().train(mode)

    def _apply(self, *arguments: Any, **keywords: Any) -> Prepared:
        self.entries.clear()
        return super()._apply(*arguments, **keywords)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.entries.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "entries": {}}


def _may_remember(tensors: tuple[Tensor, ...]) -> bool:
    if torch.compiler.is_compiling() or any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return False
    traced = torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack() > 0
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if traced or needs_grad or forward_ad._current_level >= 0:
        return False
    if tensors[0].is_cuda:
        return not (torch.cuda.is_current_stream_capturing() or any(tensor.is_inference() for tensor in tensors))
    return tensors[0].device.type == "cpu"


def _key(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    device = tensors[0].device
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    versions = [None if tensor.is_inference() else tensor._version for tensor in tensors]
    layouts = [(tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()) for tensor in tensors]
    return autocast, torch.is_inference_mode_enabled(), stream, versions, layouts
