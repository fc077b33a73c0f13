"""The one table of sample inputs: operator tests, gradient checks, compile checks, kernels and benchmarks read it.

Each operator has a file here: how a call of it is built from sizes, and its rows. A row names a public function of
`ovseg_fast.ops`, tells itself apart by an id, and builds the arguments of one call. Numbers are drawn in float32 and
then cast, so one seed gives a float32 and a float64 call the very same inputs.

Tags: small (cheap enough for a numerical derivative), odd (sizes that are no multiple of anything), one-class,
many-classes (300), batch, per-image (guidance differs between the images), empty (no image), wide (few tokens of the
published widths, which are all that some CUDA C++ kernels take), sixteens (widths in multiples of 16, which some CPU
kernels want; for these alone), bench (the published size).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ovseg_fast import ops

from ._sample import HELPERS, WIDE, Build, Call, Draw, Sample
from .class_aggregation import CLASS_AGGREGATION, class_aggregation
from .cost_embedding import COST_EMBEDDING, cost_embedding, embed_volume
from .cost_volume import COST_VOLUME, cost_volume
from .encoder_block import ENCODER_BLOCK, encoder_block
from .gaussian_aggregation import GAUSSIAN_AGGREGATION, gaussian_aggregation
from .label_map import LABEL_MAP, label_map
from .layer_gather import LAYER_GATHER, layer_gather
from .mask_attention import MASK_ATTENTION, mask_attention
from .mask_losses import MASK_LOSSES, mask_losses
from .spatial_aggregation import SPATIAL_AGGREGATION, spatial_aggregation
from .upsampling_decoder import UPSAMPLING_DECODER, guidance_term, upsampling_decoder

SAMPLES = [
    *COST_VOLUME,
    *COST_EMBEDDING,
    *ENCODER_BLOCK,
    *SPATIAL_AGGREGATION,
    *CLASS_AGGREGATION,
    *UPSAMPLING_DECODER,
    *LAYER_GATHER,
    *GAUSSIAN_AGGREGATION,
    *MASK_ATTENTION,
    *MASK_LOSSES,
    *LABEL_MAP,
]

# The NamedTuple that an operator takes its weights in.
WEIGHTS: dict[str, Any] = {
    "class_aggregation": ops.ClassAggregationWeights,
    "encoder_block": ops.EncoderBlockWeights,
    "spatial_aggregation": ops.SpatialAggregationWeights,
}

__all__ = [
    "HELPERS",
    "SAMPLES",
    "WIDE",
    "Build",
    "Call",
    "Draw",
    "Sample",
    "arguments",
    "class_aggregation",
    "cost_embedding",
    "cost_volume",
    "draw",
    "embed_volume",
    "encoder_block",
    "floating",
    "gaussian_aggregation",
    "guidance_term",
    "invoke",
    "label_map",
    "layer_gather",
    "map_floating",
    "map_tensors",
    "mask_attention",
    "mask_losses",
    "select",
    "spatial_aggregation",
    "tensors",
    "upsampling_decoder",
]


def select(
    *tags: str, function: str | None = None, operator: str | None = None, without: tuple[str, ...] = ()
) -> list[Sample]:
    """The rows with all of `tags` and none of `without`."""
    rows = [
        row
        for row in SAMPLES
        if row.tags.issuperset(tags)
        and row.tags.isdisjoint(without)
        and function in (None, row.function)
        and operator in (None, row.operator)
    ]
    assert rows, f"no sample with {tags} without {without} of {function or operator}"
    return rows


def draw(build: Build, dtype: torch.dtype = torch.float64) -> Call:
    """A call drawn from PyTorch's own generator, which hypothesis resets before each example."""
    return build(Draw(torch.default_generator, dtype, "cpu"))


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`function` of every tensor in a call or a part of one; all else stays."""
    if isinstance(value, Tensor):
        return function(value)
    if hasattr(value, "_fields"):  # a NamedTuple
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, (tuple, list)):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {name: map_tensors(function, item) for name, item in value.items()}
    return value


def map_floating(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`function` of every floating-point tensor in a call or a part of one; labels and all else stay."""
    return map_tensors(lambda tensor: function(tensor) if tensor.is_floating_point() else tensor, value)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in a call or in a result, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return found


def floating(value: Any) -> list[Tensor]:
    """Every floating-point tensor in a call or in a result, in order."""
    return [tensor for tensor in tensors(value) if tensor.is_floating_point()]


def arguments(function: str, call: Call) -> dict[str, Any]:
    """The arguments of a call by name; weights that travel together one by one, for which see `invoke`."""
    named = dict(inspect.signature(getattr(ops, function)).bind(*call[0], **call[1]).arguments)
    flat: dict[str, Any] = {}
    for name, value in named.items():
        flat |= value._asdict() if isinstance(value, tuple(WEIGHTS.values())) else {name: value}
    return flat


def invoke(function: str, named: Mapping[str, Any]) -> Any:
    """The result of a function of `arguments`."""
    named = dict(named)
    if kind := WEIGHTS.get(function):
        named["weights"] = kind(*(named.pop(field) for field in kind._fields))
    return getattr(ops, function)(**named)
