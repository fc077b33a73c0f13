"""What every operator promises in its PyTorch form, and its checks whatever runs it, over the one table of samples.

For kernels see test_kernels.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ovseg_fast as ovs
import samples
from counterparts import COUNTERPARTS, counterpart
from layouts import LAYOUTS
from ovseg_fast import ops
from ovseg_fast.ops.common import tiles
from samples import Sample, arguments, floating, map_floating, map_tensors, select, tensors
from tolerances import KERNEL, REWRITE_FLOAT64, relative_error

LABEL_MAP = importlib.import_module("ovseg_fast.ops.label_map")  # `ops.label_map` is the function
MASK_LOSSES = importlib.import_module("ovseg_fast.ops.mask_losses")

ROWS = select(without=("bench",))  # the published sizes are checked where they are timed
LABELS = {"label_map", "top_labels"}  # without gradient
DIFFERENTIABLE = [row for row in ROWS if row.function not in LABELS]
FUNCTIONS = sorted({row.function for row in ROWS})


def row_id(row: Sample) -> str:
    return row.id


@pytest.fixture(autouse=True)
def _pytorch_form() -> Iterator[None]:
    """Which `every_backend` overrides."""
    with ovs.backend("torch"):
        yield


def assert_same(row: Sample, call: samples.Call, results: Any, expected: Any, limit: float) -> None:
    """`results` are `expected` within `limit`; a label may be another whose score is as good, for `call`'s inputs."""
    if row.function in LABELS:
        named = arguments(row.function, call)
        k = named.pop("k", 1)
        with ovs.backend("torch"):
            scores = ops.score_map(**named).double()
        labels = results if row.function == "label_map" else results[1]
        best = scores.sort(0, descending=True).values[:k]
        assert relative_error(scores.gather(0, labels.long().view(best.shape)), best) <= limit
        if row.function == "top_labels":
            assert relative_error(results[0], best) <= limit
        return
    for result, truth in zip(tensors(results), tensors(expected), strict=True):
        assert result.shape == truth.shape
        assert relative_error(result, truth) <= limit


def gradients(row: Sample, call: samples.Call) -> list[torch.Tensor]:
    """Gradients of a fixed random projection of the results with respect to every floating-point tensor of the
    call."""
    leaves = map_floating(lambda tensor: tensor.detach().requires_grad_(), call)
    projected = 0.0
    for result in tensors(row.run(leaves)):
        cotangent = torch.randn(result.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        # Numbers that every dtype holds, so that each gets the same projection.
        projected = projected + (result * cotangent.bfloat16().to(result.dtype)).sum()
    return list(torch.autograd.grad(projected, floating(leaves), materialize_grads=True))


def test_table_has_rows_of_every_kind() -> None:
    assert set(FUNCTIONS) == {name for name in ops.__all__ if name.islower()}  # the others are types
    for function in FUNCTIONS:
        assert select("small", function=function)
        assert select("odd", function=function)
    operators = {row.operator for row in ROWS}
    assert operators <= {row.operator for row in select("bench")}
    with_classes = operators - {"encoder_block", "gaussian_aggregation", "layer_gather"}
    assert with_classes <= {row.operator for row in select("one-class", without=("bench",))}
    assert with_classes <= {row.operator for row in select("many-classes", without=("bench",))}
    assert len({row.id for row in samples.SAMPLES}) == len(samples.SAMPLES)


def test_layouts_keep_the_numbers_and_change_the_strides(rng: torch.Generator) -> None:
    tensor = torch.randn(2, 3, 4, generator=rng)
    for layout in LAYOUTS.values():
        assert torch.equal(layout(tensor), tensor)
        assert not layout(tensor).is_contiguous()


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_float32_follows_float64(row: Sample, rng: torch.Generator) -> None:
    call = row.build(rng, torch.float32)
    wide = map_floating(torch.Tensor.double, call)
    results = row.run(call)
    if row.function not in LABELS:
        assert {result.dtype for result in tensors(results)} == {torch.float32}
    assert_same(row, wide, results, row.run(wide), KERNEL[torch.float32])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_layout_of_the_inputs_does_not_matter(row: Sample, layout: str, rng: torch.Generator) -> None:
    call = row.build(rng, torch.float64)
    rearranged = map_tensors(LAYOUTS[layout], call)
    assert_same(row, call, row.run(rearranged), row.run(call), REWRITE_FLOAT64)


@pytest.mark.parametrize("row", select("small", without=("bench", "wide")), ids=row_id)
def test_gradients_are_the_derivatives(row: Sample, rng: torch.Generator) -> None:
    if row.function in LABELS:
        row = next(r for r in select("small", function="score_map") if r.name == row.name)
    call = row.build(rng, torch.float64)
    inputs = [tensor.requires_grad_() for tensor in floating(call)]

    def function(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        following = iter(leaves)
        return tuple(tensors(row.run(map_floating(lambda _: next(following), call))))

    # A step so small rarely crosses one of ReLU's kinks, and float64 still leaves the derivative eight digits.
    assert torch.autograd.gradcheck(function, inputs, eps=1e-7)


@pytest.mark.parametrize("tokens", [1, 100, 10**9])
@pytest.mark.parametrize("row", DIFFERENTIABLE, ids=row_id)
def test_tiles_do_not_matter(row: Sample, tokens: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    call = row.build(rng, torch.float64)
    expected, expected_gradients = row.run(call), gradients(row, call)
    monkeypatch.setattr(tiles, "TILE_TOKENS", tokens)
    for module in (LABEL_MAP, MASK_LOSSES):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", tokens)
    assert_same(row, call, row.run(call), expected, REWRITE_FLOAT64)
    with torch.no_grad():
        assert_same(row, call, row.run(call), expected, REWRITE_FLOAT64)
    for gradient, truth in zip(gradients(row, call), expected_gradients, strict=True):
        assert torch.allclose(gradient, truth, rtol=REWRITE_FLOAT64, atol=REWRITE_FLOAT64)


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_runs_repeat_bit_by_bit_and_leave_the_inputs_alone(row: Sample, rng: torch.Generator) -> None:
    call = row.build(rng, torch.float32)
    before = map_tensors(torch.clone, call)
    first, second = tensors(row.run(call)), tensors(row.run(call))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors(call), tensors(before), strict=True))
    if row in DIFFERENTIABLE:
        first, second = gradients(row, call), gradients(row, call)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# PyTorch's fused attention gives 0, not NaN, where no score of a row is a number and a vector register holds the row;
# and 0 where all scores are −∞.
ATTENTION = ("spatial_aggregation", "mask_attention")
REGISTER = 8  # float64 numbers in the widest one


def keys(row: Sample, call: samples.Call) -> int:
    """How many keys a query has."""
    named = arguments(row.function, call)
    if "pad_length" in named:
        return named["x"].shape[1] + (named["pad_length"] > named["x"].shape[1])
    return named["memory"].shape[1] if "memory" in named else min(*named["x"].shape[2:4], named["window"]) ** 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("function", sorted(COUNTERPARTS.keys() - {"label_map"}))
def test_nan_and_infinity_come_out_where_the_formula_has_them(
    function: str, value: float, rng: torch.Generator
) -> None:
    """One element of one argument at a time, at a random place."""
    checked = 0
    for row in select(function=function, without=("bench", "empty")):
        call = row.build(rng, torch.float64)
        softmax = function in ATTENTION or call[1].get("attention") == "full"
        if softmax and (value == value or keys(row, call) < REGISTER):
            continue
        if function == "spatial_aggregation" and row.tags & {"odd", "wide"}:
            continue  # the published code takes no map that is no multiple of the window; see test_spatial_aggregation
        for argument in range(len(floating(call))):
            bad = map_tensors(torch.clone, call)
            target = floating(bad)[argument].view(-1)
            target[torch.randint(target.numel(), (1,), generator=rng)] = value
            expected = tensors(counterpart(function, bad).result())
            for result, truth in zip(tensors(row.run(bad)), expected, strict=True):
                assert torch.equal(result.isfinite(), truth.isfinite()), (row.id, argument)
                checked += int(not truth.isfinite().all())
    if function not in ATTENTION or value != value:
        assert checked


# --- bad input ---

# Axes that may be of another size while all else stays: (function, argument, axis) in the row of odd sizes.
FREE = {
    *(
        ("cost_volume", name, axis)
        for name, axis in (("image", 0), ("image", 1), ("image", 2), ("text", 0), ("text", 1))
    ),
    *(("cost_embedding", name, axis) for name, axis in (("image", 0), ("image", 1), ("image", 2), ("text", 0))),
    *(("embed_volume", "volume", axis) for axis in range(4)),
    ("spatial_aggregation", "x", 1),
    *(("class_aggregation", "x", axis) for axis in (0, 2, 3)),
    *(("encoder_block", "x", axis) for axis in (0, 1)),
    *(("guidance_term", "guidance", axis) for axis in range(3)),
    ("guidance_term", "conv1_weight", 0),
    ("upsampling_decoder", "x", 1),
    # The term hides how many channels of the first convolution read the guidance.
    ("upsampling_decoder", "up_weight", 1),
    ("upsampling_decoder", "conv1_weight", 1),
    ("layer_gather", "projection", 2),
    *(("gaussian_aggregation", "features", axis) for axis in (1, 2, 3)),
    *(("mask_losses", "logits", axis) for axis in (1, 2, 3)),
    *(("mask_losses", "labels", axis) for axis in (1, 2)),
    *((name, argument, 1) for name in ("mask_attention", "mask_scores") for argument in ("queries", "memory")),
}


def odd_call(function: str, rng: torch.Generator) -> tuple[Sample, dict[str, Any]]:
    """The row whose sizes all differ, and its arguments by name."""
    rows = select("odd", function=function, without=("bench", "small"))
    if function in ("label_map", "score_map", "top_labels"):
        rows = select("small", function=function)  # the one with every argument
    row = rows[0]
    return row, arguments(function, row.build(rng, torch.float32))


def tensor_arguments(named: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all; the members of a list are called name[i]."""
    for name, value in named.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, list) and isinstance(value[0], torch.Tensor):
            yield from ((f"{name}[{i}]", item) for i, item in enumerate(value))


def call_with(function: str, named: dict[str, Any], name: str, value: Any) -> Any:
    """Call with one argument, or one member of a list, replaced."""
    argument, _, index = name.partition("[")
    if index:
        members = list(named[argument])
        members[int(index[:-1])] = value
        value = members
    return samples.invoke(function, {**named, argument: value})


def assert_refused(
    function: str, named: dict[str, Any], name: str, value: Any, kind: type[Exception], mention: str | None = None
) -> None:
    """One sentence of the right kind that names the operator and the argument."""
    operator = samples.HELPERS.get(function, function)
    with pytest.raises(kind) as caught:
        call_with(function, named, name, value)
    message = str(caught.value)
    assert re.fullmatch(rf"({function}|{operator}): [^\n]+\.", message), message
    assert ". " not in message, message
    assert (mention or name) in message, message


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_no_tensor_is_refused(function: str, rng: torch.Generator) -> None:
    _, named = odd_call(function, rng)
    for name, tensor in tensor_arguments(named):
        optional = name in ("whole", "offset") or (function, name) == ("layer_gather", "weights")
        for value in (tensor.tolist(), tensor.numpy(), 1.0, *([] if optional else [None])):
            assert_refused(function, named, name, value, TypeError)


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_numbers_of_another_kind_are_refused(function: str, rng: torch.Generator) -> None:
    """Integers for floating-point numbers and the other way round; booleans and complex numbers for either."""
    _, named = odd_call(function, rng)
    for name, tensor in tensor_arguments(named):
        others = (torch.int64, torch.uint8) if tensor.is_floating_point() else (torch.float32, torch.float16)
        for dtype in (*others, torch.bool, torch.complex64):
            assert_refused(function, named, name, tensor.to(dtype), TypeError)


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_mixed_dtypes_and_devices_are_refused(function: str, rng: torch.Generator) -> None:
    _, named = odd_call(function, rng)
    if len(list(tensor_arguments(named))) == 1:
        return
    alone = len(floating(named)) == 1
    for name, tensor in tensor_arguments(named):
        if not (alone and tensor.is_floating_point()):
            assert_refused(function, named, name, tensor.double(), TypeError)
        assert_refused(function, named, name, tensor.to("meta"), ValueError)


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_rank_is_refused(function: str, rng: torch.Generator) -> None:
    _, named = odd_call(function, rng)
    for name, tensor in tensor_arguments(named):
        for value in (tensor[None, None, None], tensor.sum()):
            assert_refused(function, named, name, value, ValueError)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_sizes_that_do_not_fit_are_refused(function: str, rng: torch.Generator) -> None:
    """Every axis of every argument, larger, of size 1 and empty: nothing is broadcast, nothing fails inside PyTorch."""
    _, named = odd_call(function, rng)
    free = set()
    for name, tensor in tensor_arguments(named):
        for axis in range(tensor.dim()):
            larger = torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
            if (function, name, axis) in FREE:
                call_with(function, named, name, larger)
                free.add((function, name, axis))
            else:
                # Where two arguments disagree, either may be the one that is named.
                assert_refused(function, named, name, larger, ValueError, mention="must")
                for size in {0, 1} - {tensor.shape[axis]}:
                    assert_refused(function, named, name, tensor.narrow(axis, 0, size), ValueError, mention="must")
    assert free == {entry for entry in FREE if entry[0] == function}


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize(
    ("function", "sizes", "mention"),
    [
        ("cost_volume", {"classes": 0}, "T must be at least 1"),
        ("cost_volume", {"prompts": 0}, "P must be at least 1"),
        ("cost_volume", {"height": 0}, "H must be at least 1"),
        ("cost_volume", {"width": 0}, "W must be at least 1"),
        ("cost_volume", {"channels": 0}, "E must be at least 1"),
        ("cost_embedding", {"classes": 0}, "T must be at least 1"),
        ("cost_embedding", {"prompts": 0}, "P must be at least 1"),
        ("cost_embedding", {"kernel": 6}, "weight must have an odd kernel size"),
        ("embed_volume", {"classes": 0}, "T must be at least 1"),
        ("embed_volume", {"width": 0}, "W must be at least 1"),
        ("embed_volume", {"kernel": 4}, "weight must have an odd kernel size"),
        ("spatial_aggregation", {"classes": 0}, "T must be at least 1"),
        ("spatial_aggregation", {"height": 0}, "H must be at least 1"),
        ("spatial_aggregation", {"heads": 3}, "heads must divide the width 8"),
        ("spatial_aggregation", {"heads": 0}, "heads must divide the width 8"),
        ("spatial_aggregation", {"heads": -2}, "heads must divide the width 8"),
        ("spatial_aggregation", {"window": 0}, "window must be positive"),
        ("spatial_aggregation", {"height": 3}, "window must be at most min(H, W) = 3, got 4."),
        ("spatial_aggregation", {"window": 9}, "window must be at most min(H, W) = 8, got 9."),
        ("spatial_aggregation", {"shift": 4}, "shift in 0..window-1"),
        ("spatial_aggregation", {"shift": -1}, "shift in 0..window-1"),
        ("class_aggregation", {"classes": 0}, "T must be at least 1"),
        ("class_aggregation", {"height": 0}, "H must be at least 1"),
        ("class_aggregation", {"heads": 3}, "heads must divide the width 8"),
        ("class_aggregation", {"heads": 0}, "heads must divide the width 8"),
        ("class_aggregation", {"pooling": 0}, "pooling must be in 1..min(H, W) = 6"),
        ("class_aggregation", {"pooling": 7}, "pooling must be in 1..min(H, W) = 6"),
        ("class_aggregation", {"pad_length": -1}, "pad_length must be at least 0"),
        ("class_aggregation", {"attention": "softmax"}, "attention must be 'linear' or 'full', got 'softmax'"),
        ("encoder_block", {"tokens": 0}, "N must be at least 1"),
        ("encoder_block", {"heads": 0}, "heads must divide the width 16"),
        ("guidance_term", {"height": 0}, "H must be at least 1"),
        ("upsampling_decoder", {"classes": 0}, "T must be at least 1"),
        ("upsampling_decoder", {"width": 0}, "W must be at least 1"),
        ("upsampling_decoder", {"groups": 3}, "groups must divide D = 4"),
        ("upsampling_decoder", {"groups": 0}, "groups must divide D = 4"),
        ("layer_gather", {"layers": 0}, "hidden"),
        ("layer_gather", {"patches": 0}, "patches must be in 1..N = 3"),
        ("layer_gather", {"prompts": -3}, "patches must be in 1..N = 3"),
        ("gaussian_aggregation", {"layers": 0}, "L must be at least 1"),
        ("layer_gather", {"layers": 0, "weighted": True}, "hidden"),
        ("layer_gather", {"patches": 0, "weighted": True}, "patches must be in 1..N = 3"),
        ("mask_attention", {"classes": 0}, "T must be at least 1"),
        ("mask_attention", {"patches": 0}, "S must be at least 1"),
        ("mask_attention", {"heads": 3}, "heads must divide the width 8"),
        ("mask_scores", {"classes": 0, "scores_only": True}, "T must be at least 1"),
        ("mask_scores", {"patches": 0, "scores_only": True}, "S must be at least 1"),
        ("mask_scores", {"heads": 0, "scores_only": True}, "heads must divide the width 8"),
        ("mask_losses", {"classes": 0}, "T must be at least 1"),
        ("mask_losses", {"map_size": (4, 0)}, "w must be at least 1"),
        ("mask_losses", {"size": (0, 4)}, "H must be at least 1"),
        ("mask_losses", {"terms": ()}, "terms must be some of bce, focal, dice"),
        ("mask_losses", {"terms": ("bce", "bce")}, "terms must be some of bce, focal, dice"),
        ("mask_losses", {"terms": ("bce", "iou")}, "terms must be some of bce, focal, dice"),
        ("label_map", {"classes": 0}, "T must be at least 1"),
        ("label_map", {"map_size": (0, 4)}, "h must be at least 1"),
        ("label_map", {"size": (0, 4)}, "size height must be at least 1"),
        ("label_map", {"window": (0, 4)}, "window height must be at least 1"),
        ("label_map", {"canvas": (8, 0), "window": (8, 0)}, "window width must be at least 1"),
        ("score_map", {"classes": 0}, "T must be at least 1"),
        ("score_map", {"size": (8, -1)}, "size width must be at least 1"),
        ("top_labels", {"classes": 0, "k": 1}, "T must be at least 1"),
        ("top_labels", {"k": 0}, "k must be in 1..min(T, 8) = 3, got 0"),
        ("top_labels", {"k": 4}, "k must be in 1..min(T, 8) = 3, got 4"),
        ("top_labels", {"classes": 20, "k": 9}, "k must be in 1..min(T, 8) = 8, got 9"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(
    function: str, sizes: dict[str, Any], mention: str, rng: torch.Generator
) -> None:
    builder = {
        "mask_scores": samples.mask_attention,
        "score_map": samples.label_map,
        "top_labels": samples.label_map,
    }.get(function)
    build = (builder or getattr(samples, function))(**sizes)
    named = arguments(function, build(samples.Draw(rng, torch.float32, "cpu")))
    first = next(iter(named))
    assert_refused(function, named, first, named[first], ValueError, mention)
