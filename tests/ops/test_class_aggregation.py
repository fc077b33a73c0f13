"""Class aggregation: golden numbers and the literal form."""

from __future__ import annotations

import random
from collections.abc import Mapping
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ovseg_fast as ovs
import samples
from counterparts import assert_rewrite
from goldens import CLASSES, assert_gradients, to_operator
from ovseg_fast import ops
from samples import map_floating
from test_kernels import DEVICE
from test_operators import gradients
from tolerances import KERNEL, RELU_KINK, REWRITE_FLOAT64, relative_error

GOLDENS = {
    "class_pool2_t7": 2,
    "class_pool1_t7": 1,
    "class_pool2_odd": 2,
    "class_pool2_t256": 2,
    "class_pool2_t300": 2,
    "class_pool1_t300": 1,
}


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize(
    "op",
    [op if op == "class_pool2_odd" else pytest.param(op, marks=pytest.mark.slow_in_interpreter) for op in GOLDENS],
)
def test_golden(op: str) -> None:
    def aggregated(leaves: Mapping[str, Tensor]) -> Tensor:
        weights = ops.ClassAggregationWeights(**to_operator(CLASSES, leaves, "layers.0.attention."))
        x = leaves["in.x"].permute(0, 2, 3, 4, 1)
        sizes = {"heads": 4, "pooling": GOLDENS[op], "pad_length": 256}
        out = ops.class_aggregation(x, leaves["in.guidance"], weights, **sizes, attention="linear")
        return out.permute(0, 4, 1, 2, 3)

    assert_gradients(op, aggregated)


@st.composite
def all_sizes(draw: st.DrawFn) -> dict[str, Any]:
    pooling, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return {
        "batch": draw(st.integers(1, 2)),
        "classes": draw(st.integers(1, 9)),
        "height": draw(st.integers(pooling, 8)),
        "width": draw(st.integers(pooling, 8)),
        "channels": heads * draw(st.integers(1, 5)),
        "guidance": draw(st.integers(1, 5)),
        "hidden": draw(st.integers(1, 9)),
        "heads": heads,
        "pooling": pooling,
        "pad_length": draw(st.integers(0, 20)),
        "attention": draw(st.sampled_from(["linear", "full"])),
        "per_image": draw(st.booleans()),
    }


@settings(max_examples=80)
@given(sizes=all_sizes())
def test_rewrite(sizes: dict[str, Any]) -> None:
    assert_rewrite("class_aggregation", samples.draw(samples.class_aggregation(**sizes)))


@pytest.mark.parametrize("attention", ["linear", "full"])
@pytest.mark.parametrize("classes", [1, 20, 255, 256, 257])
def test_rewrite_at_the_published_list_length(classes: int, attention: str) -> None:
    sizes = {"height": 2, "width": 3, "channels": 16, "heads": 4, "pad_length": 256}
    build = samples.class_aggregation(classes=classes, attention=attention, **sizes)
    assert_rewrite("class_aggregation", samples.draw(build))


def test_guidance_shared_by_all_images_is_guidance_repeated_for_each(rng: torch.Generator) -> None:
    (x, guidance, weights), keywords = samples.class_aggregation(batch=3)(samples.Draw(rng, torch.float64, "cpu"))
    shared = ops.class_aggregation(x, guidance, weights, **keywords)
    repeated = ops.class_aggregation(x, guidance.expand(3, -1, -1), weights, **keywords)
    assert relative_error(shared, repeated) <= REWRITE_FLOAT64


def test_order_of_classes_does_not_matter(rng: torch.Generator) -> None:
    (x, guidance, weights), keywords = samples.class_aggregation(classes=7)(samples.Draw(rng, torch.float64, "cpu"))
    order = torch.randperm(7, generator=rng)
    reordered = ops.class_aggregation(x[:, order], guidance[order], weights, **keywords)
    assert relative_error(reordered, ops.class_aggregation(x, guidance, weights, **keywords)[:, order]) <= 1e-10


def test_a_padding_class_is_a_class(rng: torch.Generator) -> None:
    """A list padded by the operator gives what the same list with the padding class spelt out gives."""
    build = samples.class_aggregation(classes=3, height=2, width=2, pad_length=8)
    (x, guidance, weights), keywords = build(samples.Draw(rng, torch.float64, "cpu"))
    spelt_x = torch.cat([x, weights.padding_token.expand(1, 5, 2, 2, -1)], 1)
    spelt_guidance = torch.cat([guidance, weights.padding_guidance.expand(5, -1)])
    spelt = ops.class_aggregation(spelt_x, spelt_guidance, weights, **keywords)
    assert relative_error(ops.class_aggregation(x, guidance, weights, **keywords), spelt[:, :3]) <= REWRITE_FLOAT64


def test_over_many_calls_low_precision_gradients_are_no_further_off_than_the_pytorch_form() -> None:
    """Where ReLU decides by itself on both sides, one call says little, see RELU_KINK; the median of many does."""
    errors: dict[str, list[float]] = {"triton": [], "torch": []}
    for seed in range(6):
        pick = random.Random(seed)
        ranges = {"batch": 2, "classes": 8, "height": 4, "width": 4, "hidden": 48, "pooling": 2}
        sizes = {name: pick.randint(min(most, 2), most) for name, most in ranges.items()}
        heads = pick.randint(1, 4)
        build = samples.class_aggregation(**sizes, heads=heads, channels=heads * pick.randint(2, 8))
        row = samples.Sample("class_aggregation", f"seed {seed}", build, frozenset())
        call = row.build(torch.Generator().manual_seed(seed), torch.bfloat16, DEVICE)
        with ovs.backend("torch"):
            truths = torch.cat([grad.flatten() for grad in gradients(row, map_floating(Tensor.double, call))])
        for backend, found in errors.items():
            with ovs.backend(backend):
                found.append(relative_error(torch.cat([grad.flatten() for grad in gradients(row, call)]), truths))
    assert median(errors["triton"]) <= RELU_KINK * median(errors["torch"])


@pytest.mark.usefixtures("cpu_library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"classes": 385, "height": 2, "width": 2, "per_image": True}, id="parts of several lengths"),
        pytest.param({"classes": 385, "height": 2, "width": 3, "pooling": 2}, id="parts, pooled"),
        pytest.param({"classes": 40, "height": 3, "width": 3, "heads": 1}, id="a last task of fewer positions"),
        pytest.param({"classes": 30, "height": 7, "width": 11, "pooling": 3, "per_image": True}, id="a border dropped"),
        pytest.param({"classes": 2, "height": 13, "width": 9, "hidden": 208, "pad_length": 10**4}, id="many pads"),
    ],
)
def test_rows_of_the_kernels_for_cpus(sizes: dict[str, Any], dtype: torch.dtype, rng: torch.Generator) -> None:
    """They take a few positions at a time, or of one position some classes at a time."""
    build = samples.class_aggregation(batch=2, channels=32, **sizes)
    call = build(samples.Draw(rng, dtype, "cpu"))
    (x, guidance, weights), keywords = map_floating(Tensor.double, call)
    with ovs.backend("torch"):
        expected = ops.class_aggregation(x, guidance, weights, **keywords)
    (x, guidance, weights), keywords = call
    with ovs.backend("cpu"):
        assert relative_error(ops.class_aggregation(x, guidance, weights, **keywords), expected) <= KERNEL[dtype]
