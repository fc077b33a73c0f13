"""Mask attention: golden numbers, the literal form and PyTorch's own attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import samples
from counterparts import assert_rewrite
from goldens import ATTENTION, cascade_inputs, cascade_queries, filled, golden, to_operator
from ovseg_fast import ops
from tolerances import GOLDEN_OUTPUT, REWRITE_FLOAT64, relative_error


def test_golden() -> None:
    """The first layer of the last stage, whose memory is a layer of the encoder as it stands."""
    case, weights = golden("cascade_clip"), filled("cascade_clip_vitb", "decode_head.", "E")
    features, _, _ = cascade_inputs()
    queries = cascade_queries(weights, 2)
    parameters = to_operator(ATTENTION, weights, "cascade_decoders.2.layers.0.multihead_attn.")
    _, scores = ops.mask_attention(queries, features[6], **parameters)
    assert scores is not None
    assert case.error("head_eval.stage2.layer0.scores", scores) <= GOLDEN_OUTPUT


@st.composite
def all_sizes(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.integers(1, 4))
    return {
        "batch": draw(st.integers(1, 3)),
        "classes": draw(st.integers(1, 9)),
        "patches": draw(st.integers(1, 20)),
        "channels": heads * draw(st.integers(1, 6)),
        "heads": heads,
    }


@settings(max_examples=40)
@given(sizes=all_sizes(), return_scores=st.booleans())
def test_rewrite(sizes: dict[str, Any], return_scores: bool) -> None:
    assert_rewrite("mask_attention", samples.draw(samples.mask_attention(**sizes, return_scores=return_scores)))


@settings(max_examples=30)
@given(sizes=all_sizes())
def test_scores_alone_are_those_of_the_whole_operator(sizes: dict[str, Any]) -> None:
    assert_rewrite("mask_scores", samples.draw(samples.mask_attention(**sizes, scores_only=True)))
    (queries, memory, *parameters), keywords = samples.draw(samples.mask_attention(**sizes))
    _, scores = ops.mask_attention(queries, memory, *parameters, **keywords)
    assert scores is not None
    assert torch.equal(ops.mask_scores(queries, memory, *parameters[:4], **keywords), scores)


def test_it_is_pytorchs_multi_head_attention() -> None:
    (queries, memory, *parameters), _ = samples.draw(
        samples.mask_attention(batch=2, classes=5, patches=9, channels=24, heads=4)
    )
    attention = torch.nn.MultiheadAttention(24, 4, batch_first=True, dtype=torch.float64)
    state = {
        "in_proj_weight": torch.cat(parameters[0:6:2]),
        "in_proj_bias": torch.cat(parameters[1:6:2]),
        "out_proj.weight": parameters[6],
        "out_proj.bias": parameters[7],
    }
    attention.load_state_dict(state)
    output, scores = ops.mask_attention(queries, memory, *parameters, heads=4, return_scores=False)
    assert scores is None
    assert relative_error(output, attention(queries, memory, memory)[0]) <= REWRITE_FLOAT64


def test_dropout_drops_attention_but_never_scores(rng: torch.Generator) -> None:
    build = samples.mask_attention(classes=20, patches=50, channels=16)
    (args, keywords) = build(samples.Draw(rng, torch.float64, "cpu"))
    output, scores = ops.mask_attention(*args, **keywords)
    dropped, dropped_scores = ops.mask_attention(*args, **keywords, dropout=0.5)
    assert scores is not None
    assert dropped_scores is not None
    assert torch.equal(scores, dropped_scores)
    assert relative_error(dropped, output) > 1e-2
    nothing, _ = ops.mask_attention(*args, **keywords, dropout=1.0)
    torch.testing.assert_close(nothing, args[-1].expand_as(nothing))  # all weights dropped: only the last bias is left


@pytest.mark.parametrize("dropout", [-0.1, 1.1])
def test_dropout_must_be_a_probability(dropout: float) -> None:
    args, keywords = samples.draw(samples.mask_attention())
    with pytest.raises(ValueError, match=r"mask_attention: dropout must be in 0\.\.1, got"):
        ops.mask_attention(*args, **keywords, dropout=dropout)
