"""Gaussian aggregation: golden numbers and the literal form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import literal
import ovseg_fast as ovs
import samples
from counterparts import assert_rewrite
from goldens import ATTENTION, cascade_inputs, cascade_queries, filled, golden, to_operator
from ovseg_fast import ops
from ovseg_fast.ops.gaussian_aggregation import gaussian_weights
from tolerances import GOLDEN_OUTPUT


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
    with ovs.backend("torch"):
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


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_initial_weights(layers: int) -> None:
    weights = gaussian_weights(layers)
    assert weights.dtype == torch.float32
    assert weights[-1] == 1
    torch.testing.assert_close(weights, literal.gaussian_weights(layers))
    # One layer further away costs exp(−(2d + 1) / 2).
    for distance in range(1, layers):
        ratio = weights[-1 - distance] / weights[-distance]
        torch.testing.assert_close(ratio, torch.tensor(-(2 * distance - 1) / 2).exp())
