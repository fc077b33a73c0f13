"""What a sample is: a row of an operator's table, and the random tensors of its call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ovseg_fast import ops

PUBLISHED_CATSEG = {"height": 24, "width": 24, "channels": 128, "guidance": 128, "heads": 4}
WIDE = {"channels": 128, "guidance": 64, "hidden": 128, "heads": 4}

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments
Build = Callable[["Draw"], Call]


class Draw:
    """Random tensors of one dtype on one device."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str) -> None:
        self.generator, self.dtype, self.device = generator, dtype, device

    def __call__(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        drawn = torch.randn(shape, generator=self.generator, device=self.generator.device)
        return drawn.to(self.device, self.dtype)

    def tokens(self, *shape: int) -> Tensor:
        """Tokens (..., channels) for a layer norm: half of a token's channels, at random, lie 3 above the others.

        A norm over a few channels which happen to be nearly equal would magnify their rounding as nothing real does.
        """
        order = torch.rand(shape, generator=self.generator, device=self.generator.device).argsort(-1)
        return self(*shape) + (order % 2 * 3 - 1.5).to(self.device, self.dtype)

    def weight(self, *shape: int) -> Tensor:
        """A weight (out, in, ...) that keeps the variance."""
        return self(*shape) / math.sqrt(max(math.prod(shape[1:]), 1))

    def norm(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of a normalisation."""
        return 1 + 0.1 * self(*shape), 0.1 * self(*shape)

    def linear(self, out: int, into: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of a linear layer."""
        return self.weight(out, into), 0.1 * self(out)


@dataclass(frozen=True)
class Sample:
    """One row: `function` of `ovseg_fast.ops`, what tells the row apart, how to build its call, and its tags."""

    function: str
    name: str
    builder: Build
    tags: frozenset[str]

    @property
    def id(self) -> str:
        return f"{self.function}-{self.name}"

    @property
    def operator(self) -> str:
        """The operator that the function belongs to."""
        return HELPERS.get(self.function, self.function)

    def build(
        self,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Call:
        """Positional and keyword arguments of one call."""
        return self.builder(Draw(generator, dtype, device))

    def run(self, call: Call) -> Any:
        """The function's result."""
        return getattr(ops, self.function)(*call[0], **call[1])


HELPERS = {
    "embed_volume": "cost_embedding",
    "guidance_term": "upsampling_decoder",
    "mask_scores": "mask_attention",
    "score_map": "label_map",
    "top_labels": "label_map",
}


def row(function: str, name: str, builder: Build, *tags: str) -> Sample:
    return Sample(function, name, builder, frozenset(tags))
