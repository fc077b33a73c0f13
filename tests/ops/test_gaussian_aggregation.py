"""Gaussian aggregation: golden numbers and the literal form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import literal
import ovseg_fast as ovs
import samples
from counterparts import assert_rewrite
from goldens import ATTENTION, cascade_inputs, cascade_queries, filled, golden, to_operator
from ovseg_fast import ops
from ovseg_fast.ops.gaussian_aggregation import gaussian_weights
from test_kernels import DEVICE
from tolerances import GOLDEN_OUTPUT, KERNEL, relative_error


@pytest.fixture(params=["triton", "cuda"])
def kernels(request: pytest.FixtureRequest) -> str:
    """The backend whose kernels are tested."""
    if request.param == "cuda":
        request.getfixturevalue("emulation")
    return request.param


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize(("stage", "name", "first"), [(0, "weights_s1", 0), (1, "weights_s2", 3)])
def test_golden(stage: int, name: str, first: int) -> None:
    """The first scores of a stage are linear in its aggregated map."""
    case, weights = golden("cascade_clip"), filled("cascade_clip_vitb", "decode_head.", "E")
    features, _, _ = cascade_inputs()
    queries = cascade_queries(weights, stage)
    memory = ops.gaussian_aggregation(features[first : first + 3], weights[name])
    parameters = to_operator(ATTENTION, weights, f"cascade_decoders.{stage}.layers.0.multihead_attn.")
    kept = {name: tensor for name, tensor in parameters.items() if name[0] in "qk"}
    scores = ops.mask_scores(queries, memory, **kept)
    assert case.error(f"head_eval.stage{stage}.layer0.scores", scores) <= GOLDEN_OUTPUT


@settings(max_examples=30)
@given(
    sizes=st.fixed_dictionaries(
        {
            "layers": st.integers(1, 7),
            "batch": st.integers(1, 3),
            "patches": st.integers(1, 20),
            "channels": st.integers(1, 20),
        }
    )
)
def test_rewrite(sizes: dict[str, int]) -> None:
    assert_rewrite("gaussian_aggregation", samples.draw(samples.gaussian_aggregation(**sizes)))


@settings(max_examples=30)
@given(
    sizes=st.fixed_dictionaries(
        {
            "layers": st.integers(1, 4),
            "batch": st.integers(1, 3),
            "prompts": st.integers(-1, 4),
            "patches": st.integers(1, 9),
            "channels": st.integers(2, 12),
            "out": st.integers(1, 9),
        }
    )
)
def test_rewrite_of_a_stage(sizes: dict[str, int]) -> None:
    assert_rewrite("gather_stage", samples.draw(samples.gather_stage(**sizes)))


def test_a_stage_is_the_sum_of_its_gathered_layers(rng: torch.Generator) -> None:
    (*gathered, weights), _ = samples.gather_stage()(samples.Draw(rng, torch.float64, "cpu"))
    for epsilons in ({}, {"shared_eps": 1e-2, "norm_eps": 1e-3}):
        expected = ops.gaussian_aggregation(ops.layer_gather(*gathered, **epsilons), weights)
        assert torch.equal(ops.gather_stage(*gathered, weights, **epsilons), expected)


def test_a_weight_for_each_layer() -> None:
    (*gathered, weights), _ = samples.draw(samples.gather_stage())
    with pytest.raises(ValueError, match="gather_stage: weights must be"):
        ops.gather_stage(*gathered, weights[:2])


@pytest.mark.parametrize("layers", [1, 3, 9])
def test_kernels_of_a_stage_store_no_single_layer(
    layers: int, kernels: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, _ = samples.gather_stage(layers=layers, batch=2, patches=29)(samples.Draw(rng, torch.float32, DEVICE))
    truth = ops.gather_stage(*samples.map_tensors(Tensor.double, call))
    allocated, new_empty = [], Tensor.new_empty

    def recorded(tensor: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        result = new_empty(tensor, *arguments, **keywords)
        allocated.append(result.numel())
        return result

    monkeypatch.setattr(Tensor, "new_empty", recorded)
    with ovs.backend(kernels):
        result = ops.gather_stage(*call)
    assert relative_error(result, truth) <= KERNEL[torch.float32]
    # One launch of Triton's takes eight layers; of more, the sums of each launch's are kept.
    assert sum(allocated) == result.numel() * (3 if kernels == "triton" and layers > 8 else 1)


@pytest.mark.parametrize(("layers", "sigma"), [(1, 1.0), (3, 1.0), (5, 0.5)])
def test_initial_weights(layers: int, sigma: float) -> None:
    weights = gaussian_weights(layers, sigma)
    assert weights.dtype == torch.float32
    assert weights[-1] == 1
    torch.testing.assert_close(weights, literal.gaussian_weights(layers, sigma))
    # One layer further away costs exp(−(2d + 1) / 2σ²).
    for distance in range(1, layers):
        ratio = weights[-1 - distance] / weights[-distance]
        torch.testing.assert_close(ratio, torch.tensor(-(2 * distance - 1) / (2 * sigma**2)).exp())
