"""Optimiser groups and schedules."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

import ovseg_fast as ovs
from ovseg_fast.models import CascadeCLIP, CATSeg, Hyperparameters
from ovseg_fast.training.finetuning import set_trainable
from ovseg_fast.training.optimizer import (
    build_optimizer,
    build_schedule,
    cosine,
    parameter_groups,
    poly,
    with_clip_rate,
)


def settings_of(model):
    """(learning rate, weight decay) of every trainable parameter by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model)
    found = {
        names[id(parameter)]: (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]
    }
    assert len(found) == sum(len(group["params"]) for group in groups)  # each once
    return found


def test_catseg_groups():
    model = ovs.build("catseg-tiny")
    trainable = set_trainable(model)
    found = settings_of(model)
    assert set(found) == set(trainable)
    for name, (rate, decay) in found.items():
        assert rate == pytest.approx(2e-6 if name.startswith("clip.") else 2e-4), name
        assert decay == (0 if ".norm" in name or "guidance_norm" in name else 1e-4), name
    assert found["aggregator.cost_embedding.weight"] == (2e-4, 1e-4)  # a convolution, no embedding
    assert found["aggregator.decoder.stages.0.norm1.weight"] == (2e-4, 0)
    assert len(parameter_groups(model)) == 3


def test_catseg_embeddings_do_not_decay():
    model = ovs.build("catseg-tiny")
    set_trainable(model, "full")
    found = settings_of(model)
    for name in (
        *("visual.class_embedding", "visual.positional_embedding", "text.positional_embedding"),
        *("text.token_embedding.weight", "visual.ln_pre.weight", "text.ln_final.bias"),
        "visual.transformer.resblocks.0.ln_1.weight",
    ):
        assert found[f"clip.{name}"] == (pytest.approx(2e-6), 0), name
    for name in ("visual.proj", "visual.conv1.weight", "visual.transformer.resblocks.0.attn.in_proj_bias"):
        assert found[f"clip.{name}"] == (pytest.approx(2e-6), 1e-4), name


def test_cascade_clip_groups():
    model = ovs.build("cascade-clip-tiny")
    set_trainable(model)
    found = settings_of(model)
    assert all(rate == pytest.approx(2e-4) for rate, _ in found.values())
    assert found["image_encoder.prompt_norm.weight"][1] == 0
    assert found["head.decoders.0.layers.0.norm2.bias"][1] == 0
    assert found["image_encoder.prompt_embeddings"][1] == 0.01
    assert found["image_encoder.deep_prompt_embeddings"][1] == 0.01
    assert found["head.stage_weights.0"][1] == 0.01
    assert found["head.query_projections.0.weight"][1] == 0.01
    set_trainable(model, "full")
    found = settings_of(model)
    assert found["image_encoder.proj_layers"] == (2e-5, 0.01)
    assert found["image_encoder.norm_weight"] == (2e-5, 0)
    assert found["image_encoder.clip.ln_post.weight"] == (2e-5, 0)
    assert found["text_encoder.text_projection"] == (2e-5, 0.01)


def test_published_settings():
    catseg, cascade = CATSeg.hyperparameters, CascadeCLIP.hyperparameters
    assert (catseg.max_gradient_norm, cascade.max_gradient_norm) == (0.01, None)
    assert (catseg.steps, catseg.batch, cascade.batch) == (80_000, 4, 16)
    with pytest.raises(FrozenInstanceError):
        catseg.learning_rate = 1.0
    with pytest.raises(TypeError, match="model must be a SegmentationModel, got Linear"):
        parameter_groups(torch.nn.Linear(1, 1))


def test_settings_override_the_published_ones():
    model = ovs.build("catseg-tiny")
    set_trainable(model)
    settings = replace(CATSeg.hyperparameters, learning_rate=1e-3, weight_decay=0.0, factors={})
    (group,) = build_optimizer(model, settings).param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0)


@pytest.mark.parametrize("method", ["cat-seg", "cascade-clip"])
def test_clip_has_its_own_learning_rate(method):
    model = ovs.build("catseg-tiny" if method == "cat-seg" else "cascade-clip-tiny")
    set_trainable(model, "full")
    own = ("clip.",) if method == "cat-seg" else ("image_encoder.clip.", "text_encoder.")
    before = settings_of(model)
    groups = parameter_groups(model, with_clip_rate(model.hyperparameters, 5e-4))
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if name.startswith(own):
            assert rates[id(parameter)] == pytest.approx(5e-4), name
        elif not name.startswith(("image_encoder.norm_", "image_encoder.proj_layers")):  # as CLIP's own
            assert rates[id(parameter)] == pytest.approx(before[name][0]), name


def test_nothing_to_train():
    model = ovs.build("catseg-tiny").requires_grad_(False)
    with pytest.raises(ValueError, match="model must have a parameter that requires gradients"):
        parameter_groups(model)


def rates(model, steps, every):
    """Learning rates of all groups as an optimiser goes through a schedule."""
    optimizer = build_optimizer(model)
    schedule = build_schedule(optimizer, model.hyperparameters, steps)
    found = []
    for step in range(steps + 2):
        if step % every == 0:
            found.append((step, [group["lr"] for group in optimizer.param_groups]))
        optimizer.step()
        schedule.step()
    return found


def test_cosine_over_a_training():
    model = ovs.build("catseg-tiny")
    set_trainable(model)
    starts = [group["lr"] for group in parameter_groups(model)]
    assert len({*starts}) == 2
    for step, found in rates(model, 40, 10):
        share = 0.5 * (1 + math.cos(math.pi * step / 40))
        assert found == pytest.approx([start * share for start in starts], abs=1e-18)


def test_poly_over_a_training():
    model = ovs.build("cascade-clip-tiny")
    set_trainable(model, "full")
    starts = [group["lr"] for group in parameter_groups(model)]
    assert len({*starts}) == 2
    (first, at_first), *_, (last, at_last) = rates(model, 3000, 500)
    assert (first, last) == (0, 3000)
    assert at_first == pytest.approx([1e-6 * start for start in starts])  # a share of the rate, not a rate
    assert at_last == pytest.approx([1e-6] * len(starts))
    for step, found in rates(model, 3000, 500)[3:]:  # after the warm-up
        assert found == pytest.approx([1e-6 + (start - 1e-6) * (1 - step / 3000) ** 0.9 for start in starts])
    for step, found in rates(model, 3000, 500)[:3]:
        decayed = [1e-6 + (start - 1e-6) * (1 - step / 3000) ** 0.9 for start in starts]
        assert found == pytest.approx([rate * (1e-6 + (1 - 1e-6) * step / 1500) for rate in decayed])


def test_schedules_stay_at_their_end():
    assert cosine(10)(0) == 1
    assert cosine(10)(25) == pytest.approx(0, abs=1e-15)
    schedule = poly(10, 0.1, Hyperparameters(end=0.01))
    assert (schedule(0), schedule(10), schedule(99)) == (1, pytest.approx(0.1), pytest.approx(0.1))


def test_bad_schedules():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        cosine(0)
    with pytest.raises(ValueError, match="steps must be at least 1, got -3"):
        poly(-3, 0.1, Hyperparameters())
    with pytest.raises(ValueError, match=r"rate must be positive, got 0\.0"):
        poly(10, 0.0, Hyperparameters())
    with pytest.raises(ValueError, match="warmup must be a number of steps, 0 or more, got -1"):
        poly(10, 0.1, Hyperparameters(warmup=-1))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match="schedule must be cosine or poly, got 'step'"):
        build_schedule(optimizer, replace(CATSeg.hyperparameters, schedule="step"))
