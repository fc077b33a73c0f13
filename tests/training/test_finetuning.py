"""Fine-tuning policies: the published lists of trainable parameters, and every policy on the small models."""

from __future__ import annotations

import pytest
import torch

import ovseg_fast as ovs
from full_models import upstream_parts, upstream_trainable
from goldens import golden
from ovseg_fast.training.finetuning import set_trainable

FULL = [("catseg_vitb", "catseg-vitb", "train.frozen"), ("cascade_clip", "cascade-clip-vitb", "frozen")]


@pytest.mark.parametrize(("case", "preset", "frozen"), FULL)
def test_the_published_parameters_are_trained(case, preset, frozen):
    facts = golden(case).facts
    with torch.device("meta"):
        model = ovs.build(preset)
    set_trainable(model)
    trainable = set(upstream_trainable(model))
    # Buffers here, parameters there: what the published decoder layers hold and never read.
    unused = {name for name, (_, parts) in upstream_parts(model).items() if any(".unused." in own for own, _ in parts)}
    assert unused <= set(facts["trainable"])
    assert trainable == set(facts["trainable"]) - unused
    assert set(upstream_parts(model)) - trainable - unused == set(facts[frozen])


def trained(preset, policy):
    model = ovs.build(preset)
    names = set_trainable(model, policy)
    assert names == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return set(names), {name for name, _ in model.named_parameters()}


def test_policies_of_catseg():
    names, everything = trained("catseg-tiny", "attention")
    clip = {name for name in everything if name.startswith("clip.")}
    projections = {name for name in clip if name.endswith(("q_proj_weight", "v_proj_weight"))}
    assert len(projections) == 2 * (6 + 2)  # image and text blocks
    assert names == everything - clip | projections
    assert not any("positional" in name for name in names)
    assert trained("catseg-tiny", "full")[0] == everything
    assert trained("catseg-tiny", "none")[0] == everything - clip
    assert trained("catseg-tiny", None)[0] == names


def test_policies_of_cascade_clip():
    names, everything = trained("cascade-clip-tiny", "prompt")
    head = {name for name in everything if name.startswith("head.")}
    prompts = {
        *("image_encoder.prompt_embeddings", "image_encoder.deep_prompt_embeddings"),
        *(f"image_encoder.prompt_{part}.{kind}" for part in ("proj", "norm") for kind in ("weight", "bias")),
    }
    gather = {f"image_encoder.{name}" for name in ("norm_weight", "norm_bias", "proj_layers")}
    assert names == head | prompts
    assert trained("cascade-clip-tiny", None)[0] == names
    assert trained("cascade-clip-tiny", "none")[0] == head
    assert trained("cascade-clip-tiny", "full")[0] == everything
    projections = {name for name in everything if name.endswith(("q_proj_weight", "v_proj_weight"))}
    assert len(projections) == 2 * (6 + 2)
    assert trained("cascade-clip-tiny", "attention")[0] == head | prompts | gather | projections


def test_a_later_policy_replaces_an_earlier_one():
    model = ovs.build("catseg-tiny")
    set_trainable(model, "full")
    assert set_trainable(model, "none") == trained_names(model)


def trained_names(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_published_policies():
    assert ovs.build("catseg-tiny").policy == "attention"
    assert ovs.build("cascade-clip-tiny").policy == "prompt"


def test_bad_input():
    model = ovs.build("catseg-tiny")
    before = trained_names(model)
    with pytest.raises(ValueError, match="policy of CATSeg must be one of attention, full, none, got 'lora'"):
        set_trainable(model, "lora")
    with pytest.raises(ValueError, match="policy of CATSeg must be one of attention, full, none, got 'prompt'"):
        set_trainable(model, "prompt")
    assert trained_names(model) == before
    with pytest.raises(TypeError, match="model must be a SegmentationModel, got Linear"):
        set_trainable(torch.nn.Linear(2, 2), "full")
