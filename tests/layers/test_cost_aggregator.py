"""Cost aggregator: the published aggregator's numbers, and the literal form at other sizes."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

import literal
import ovseg_fast as ovs
from counterparts import assert_equal_functions
from goldens import (
    AGGREGATOR_RULES,
    DEVICE,
    aggregator_weights,
    golden,
    layer_name,
    layer_state,
    published_state,
)
from ovseg_fast import ops
from ovseg_fast.layers.cost_aggregator import DROPPED_LOGIT, CostAggregator
from tolerances import GOLDEN_CATSEG_GRADIENT, GOLDEN_OPERATOR_GRADIENT, GOLDEN_OUTPUT, REWRITE_FLOAT64, relative_error

CASE = "catseg_aggregator"
TRITON = (("t7_pool1", 1), ("t7_p3", 2), ("t171", 2), ("t256", 2))
ON_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: too large for Triton's interpreter")


def published(prompts: int = 1) -> CostAggregator:
    """The aggregator of CAT-Seg ViT-B with the goldens' weights."""
    aggregator = CostAggregator(
        embed_dim=512,
        prompts=prompts,
        channels=128,
        guidance=128,
        layers=2,
        heads=4,
        window=12,
        pad_length=256,
        decoder_appearance=(256, 128),
        decoder_guidance=(32, 16),
        decoder_channels=(64, 32),
    )
    aggregator.load_state_dict(layer_state(AGGREGATOR_RULES, aggregator_weights("B", prompts)))
    return aggregator.to(DEVICE)


def inputs(op: str) -> dict[str, Tensor]:
    """In upstream's layout."""
    run = next(run for run in golden(CASE).facts["runs"] if run["op"] == op)
    batch, classes, prompts = run["B"], run["T"], run["P"]
    shapes = {
        "img": (batch, 512, 24, 24),
        "text": (classes, prompts, 512),
        "g0": (batch, 512, 24, 24),
        "g1": (batch, 256, 48, 48),
        "g2": (batch, 128, 96, 96),
    }
    return {name: golden(CASE).randn(f"{op}.in.{name}", shape) for name, shape in shapes.items()}


def run(aggregator: CostAggregator, named: dict[str, Tensor], pooling: int) -> Tensor:
    """The goldens' appearance guidance g0 is not the image of the cost volume, as it is in the model."""
    image, appearance, *guidance = (named[name].permute(0, 2, 3, 1) for name in ("img", "g0", "g1", "g2"))
    volume, embedding = ops.cost_volume, ops.cost_embedding
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "cost_volume", lambda _, *others: volume(image, *others))
        patch.setattr(ops, "cost_embedding", lambda _, *others: embedding(image, *others))
        return aggregator(appearance, named["text"], guidance, pooling)


@pytest.mark.parametrize(
    ("op", "pooling", "backend"),
    [
        ("t7_pool1", 1, "torch"),
        ("t7_p3", 2, "torch"),
        ("t171", 2, "torch"),
        pytest.param("t256", 2, "torch", marks=pytest.mark.slow),
        ("t7_pool1", 1, "auto"),  # the kernels for CPUs that there are
        ("t7_p3", 2, "auto"),
        ("t171", 2, "auto"),
        pytest.param("t256", 2, "auto", marks=pytest.mark.slow),
        *[pytest.param(op, pooling, "triton", marks=ON_GPU) for op, pooling in TRITON],
    ],
)
def test_golden(op: str, pooling: int, backend: str) -> None:
    with torch.no_grad(), ovs.backend(backend):
        logits = run(published(3 if op == "t7_p3" else 1), inputs(op), pooling)
    assert golden(CASE).error(f"{op}.out", logits) <= GOLDEN_OUTPUT


def test_golden_of_more_classes_than_the_list_holds() -> None:
    case, named = golden(CASE), inputs("t300")
    volume = ops.cost_volume(named["img"].permute(0, 2, 3, 1), named["text"])
    assert case.error("t300.score", volume.amax((2, 3, 4))) <= GOLDEN_OUTPUT
    with torch.no_grad():
        logits = run(published(), named, 2)
    selected = case.store["t300.selected"][0]
    assert case.error("t300.out", logits) <= GOLDEN_OUTPUT
    assert case.error("t300.out_selected", logits[:, selected]) <= GOLDEN_OUTPUT
    dropped = sorted(set(range(300)) - set(selected.tolist()))
    assert len(dropped) == 44
    assert (logits[:, dropped] == DROPPED_LOGIT).all()
    assert (logits[:, selected] != DROPPED_LOGIT).any((2, 3)).all()


def golden_gradients(dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Logits of the golden step, and the gradients of its inputs and, by published names, parameters."""
    case, aggregator = golden(CASE), published().to(dtype)
    named = {name: leaf.to(dtype).requires_grad_() for name, leaf in inputs("t7").items()}
    logits = run(aggregator, named, 2)
    (logits * case.randn("t7.cot", tuple(logits.shape)).to(dtype)).sum().backward()
    parameters = dict(aggregator.named_parameters())
    expected = case.facts["t7.grads"]["grad_norm"]
    assert {layer_name(AGGREGATOR_RULES, name) for name in expected} == set(parameters)
    of_inputs = {name: cast(Tensor, leaf.grad) for name, leaf in named.items()}
    return (
        logits,
        of_inputs,
        {name: cast(Tensor, parameters[layer_name(AGGREGATOR_RULES, name)].grad) for name in expected},
    )


def test_golden_gradients() -> None:
    """In float32; the projections, where large terms cancel, in float64.

    Rounding in float32 moves the projection of the class block's biases by up to 1.6e-3 of their norm on some
    processors. float64 gives the golden projections to 8.4e-5, so its limit is the narrower one.
    """
    case = golden(CASE)
    logits, of_inputs, gradients = golden_gradients(torch.float32)
    assert case.error("t7.out", logits) <= GOLDEN_OUTPUT
    for name, gradient in of_inputs.items():
        assert case.error(f"t7.grad.in.{name}", gradient) <= GOLDEN_CATSEG_GRADIENT, name
    assert case.facts["t7.grads"]["grad_none"] == []
    _, _, exact = golden_gradients(torch.float64)
    case.assert_summaries("t7.grads", gradients, GOLDEN_CATSEG_GRADIENT, projected=exact)
    case.assert_summaries("t7.grads", exact, GOLDEN_OPERATOR_GRADIENT)


# --- other sizes ---


def small(**sizes: Any) -> CostAggregator:
    """A float64 aggregator with random parameters everywhere."""
    aggregator = CostAggregator(
        embed_dim=6,
        prompts=sizes["prompts"],
        channels=8,
        guidance=5,
        layers=sizes["layers"],
        heads=2,
        window=sizes["window"],
        pad_length=sizes["pad_length"],
        decoder_appearance=(4, 3),
        decoder_guidance=(3, 2),
        decoder_channels=(16, 16),
    ).double()
    for parameter in aggregator.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    return aggregator


def small_inputs(sizes: dict[str, Any]) -> dict[str, Any]:
    batch, height, width = sizes["batch"], sizes["window"] * sizes["rows"], sizes["window"] * sizes["columns"]

    def maps(scale: int, channels: int) -> Tensor:
        return torch.randn(batch, scale * height, scale * width, channels, dtype=torch.float64)

    return {
        "image": maps(1, 6),
        "text": torch.randn(sizes["classes"], sizes["prompts"], 6, dtype=torch.float64),
        "appearance": [maps(2, 4), maps(4, 3)],
    }


@settings(max_examples=20)
@given(
    sizes=st.fixed_dictionaries(
        {
            "batch": st.integers(1, 2),
            "classes": st.integers(1, 6),
            "prompts": st.integers(1, 3),
            "window": st.integers(2, 3),
            "rows": st.integers(1, 2),
            "columns": st.integers(1, 2),
            "layers": st.integers(1, 2),
            "pooling": st.integers(1, 2),
            "pad_length": st.integers(1, 8),
        }
    )
)
def test_rewrite(sizes: dict[str, Any]) -> None:
    """With more classes than `pad_length` too, where each image keeps classes of its own."""
    aggregator = small(**sizes)
    names = list(aggregator_weights("B"))

    def ours(state: dict[str, Tensor], **named: Any) -> Tensor:
        return functional_call(aggregator, state, (), {**named, "pooling": sizes["pooling"]})

    def theirs(state: dict[str, Tensor], **named: Any) -> Tensor:
        image, *guidance = (maps.permute(0, 3, 1, 2) for maps in (named["image"], *named["appearance"]))
        return literal.catseg_head(
            published_state(AGGREGATOR_RULES, names, state),
            image,
            named["text"].expand(len(image), -1, -1, -1),
            *guidance,
            pooling=sizes["pooling"],
            pad_len=sizes["pad_length"],
            window=sizes["window"],
            heads=2,
        )

    state = {name: parameter.detach() for name, parameter in aggregator.named_parameters()}
    assert_equal_functions(((), {"state": state, **small_inputs(sizes)}), ours, theirs)


def test_tiles_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"batch": 2, "prompts": 1, "window": 2, "rows": 2, "columns": 2, "layers": 1, "pad_length": 4}
    aggregator, named = small(**sizes), small_inputs({**sizes, "classes": 6})
    expected = aggregator(**named, pooling=1)
    for tokens in (1, 40, 10**9):
        monkeypatch.setattr("ovseg_fast.ops.common.tiles.TILE_TOKENS", tokens)
        assert relative_error(aggregator(**named, pooling=1), expected) <= REWRITE_FLOAT64
        with torch.no_grad():
            assert relative_error(aggregator(**named, pooling=1), expected) <= REWRITE_FLOAT64


def test_every_image_keeps_its_own_classes() -> None:
    """Two images that look like different classes."""
    sizes = {"batch": 2, "prompts": 1, "window": 2, "rows": 1, "columns": 1, "layers": 1, "pad_length": 2}
    aggregator, named = small(**sizes), small_inputs({**sizes, "classes": 4})
    named["text"] = torch.eye(6, dtype=torch.float64)[:4].unsqueeze(1)
    named["image"] = 1 + 0.01 * named["image"]
    named["image"][0, 0, 0, [0, 3]] += 5
    named["image"][1, 1, 0, [1, 2]] += 5
    logits = aggregator(**named, pooling=1)
    dropped = (logits == DROPPED_LOGIT).all(-1).all(-1)
    assert dropped.tolist() == [[False, True, True, False], [True, False, False, True]]
