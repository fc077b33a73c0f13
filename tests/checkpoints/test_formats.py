"""Names and shapes in upstream's formats, in both directions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from checkpoints.common import CATSEG_PREFIX, assert_same, build_empty, build_random, copy_of
from ovseg_fast import checkpoints
from ovseg_fast.checkpoints import upstream
from ovseg_fast.models import CascadeCLIP, CATSeg
from parity import make_weights

RULES = {"catseg": CATSeg.upstream_rules, "cascade": CascadeCLIP.upstream_rules}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("preset", make_weights.PRESETS)
def test_every_upstream_key_maps_to_one_place(preset: str) -> None:
    model, published = build_empty(preset), make_weights.shapes(preset)
    ours = shapes_of(model)
    keys = json.loads((Path(make_weights.__file__).parent / make_weights.PRESETS[preset][0]).read_text())
    assert [key for key in published if upstream.matches_any(model.upstream_derived, key)] == keys["buffers"]

    stored = upstream.upstream_format(RULES[preset.split("-")[0]], ours)
    assert {key: how.shape for key, how in stored.items()} == {
        key: shape for key, shape in published.items() if key not in keys["buffers"]
    }
    places = [part for how in stored.values() for part in how.parts]
    stacked = ("image_encoder.norm_weight", "image_encoder.norm_bias")
    expected = {name: list(range(shape[0])) if name in stacked else [None] for name, shape in ours.items()}
    assert {name: [row for owner, row in places if owner == name] for name in ours} == expected


@pytest.mark.parametrize("preset", ["catseg-vitb", "cascade-clip-vitb"])
def test_every_rule_is_needed(preset: str) -> None:
    rules, shapes = RULES[preset.split("-")[0]], shapes_of(build_empty(preset))
    stored = upstream.upstream_format(rules, shapes)
    for left_out in rules:
        try:
            without = upstream.upstream_format([rule for rule in rules if rule != left_out], shapes)
        except ValueError:
            continue
        assert without != stored, f"idle: {left_out}"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'adapter\.weight'"):
        upstream.upstream_format(CATSeg.upstream_rules, {"adapter.weight": (3, 4)})


def test_q_k_v_are_joined_in_upstreams_order(rng: torch.Generator) -> None:
    model = build_random("cascade-clip-tiny", rng)
    state = checkpoints.to_upstream(model)
    encoders = {"backbone": model.image_encoder.clip, "text_encoder": model.text_encoder}
    for prefix, encoder in encoders.items():
        for index, block in enumerate(encoder.transformer.resblocks):
            joined = state[f"{prefix}.transformer.resblocks.{index}.attn.in_proj_weight"]
            expected = [block.attn.q_proj_weight, block.attn.k_proj_weight, block.attn.v_proj_weight]
            assert torch.equal(joined, torch.cat(expected))


def test_rows_and_leading_ones(rng: torch.Generator) -> None:
    model = build_random("cascade-clip-tiny", rng)
    state = checkpoints.to_upstream(model)
    for index in range(4):
        assert torch.equal(state[f"backbone.ln_layers.{index}.weight"], model.image_encoder.norm_weight[index])
        assert torch.equal(state[f"backbone.ln_layers.{index}.bias"], model.image_encoder.norm_bias[index])
    assert state["backbone.prompt_embeddings"].shape == (1, 4, 64)
    layer = "decode_head.cascade_decoders.2.layers.1."
    assert torch.equal(
        state[layer + "self_attn.in_proj_bias"], model.head.decoders[2].layers[1].unused.self_attn_in_proj_bias
    )

    catseg = build_random("catseg-tiny", rng)
    padding = checkpoints.to_upstream(catseg)[CATSEG_PREFIX + "transformer.layers.1.attention.padding_tokens"]
    assert padding.shape == (1, 1, 32)
    assert torch.equal(padding[0, 0], catseg.aggregator.layers[1].classes.padding_token)


def test_round_trip_is_bit_exact(model: nn.Module, other: nn.Module) -> None:
    state = checkpoints.to_upstream(model)
    checkpoints.load_upstream(other, copy_of(state))
    assert_same(other.state_dict(), model.state_dict())
    assert_same(checkpoints.to_upstream(other), state)


def test_to_upstream_returns_copies(model: nn.Module) -> None:
    state = checkpoints.to_upstream(model)
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert not own & {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert not any(tensor.requires_grad for tensor in state.values())
    assert all(tensor.is_contiguous() for tensor in state.values())


@pytest.mark.parametrize(
    "preset",
    ["catseg-vitb", *(pytest.param(name, marks=pytest.mark.slow) for name in ("catseg-vitl", "cascade-clip-vitb"))],
)
def test_full_size_round_trip_is_bit_exact(preset: str) -> None:
    model = build_empty(preset).to_empty(device="cpu")
    state = make_weights.state_dict(preset)
    checkpoints.load_upstream(model, make_weights.PRESETS[preset][2](state))
    assert_same(checkpoints.to_upstream(model), state)  # with the derived buffers, which make_weights works out itself
