"""What `load_upstream` accepts and what it refuses, strictly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from checkpoints.common import CATSEG_PREFIX, TINY, assert_same, build_empty, build_random, copy_of, refused
from ovseg_fast import checkpoints
from ovseg_fast.checkpoints.upstream import matches_any
from ovseg_fast.models import CATSeg, build, get_preset
from parity import fill, make_weights


def placeholders(preset: str) -> dict[str, torch.Tensor]:
    """A full-size checkpoint that takes no memory."""
    return {name: torch.ones(()).expand(shape) for name, shape in make_weights.shapes(preset).items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "optimizer": {"state": {}}, "iteration": 79_999},
        lambda state: {"state_dict": state, "meta": {"mmseg_version": "0.24.0"}},
        lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
        lambda state: {"model": {f"module.{key}": tensor for key, tensor in state.items()}},
        lambda state: {f"_orig_mod.module.{key}": tensor for key, tensor in state.items()},
        lambda state: {f"module._orig_mod.{key}": tensor for key, tensor in state.items()},
        lambda state: {key: nn.Parameter(tensor) for key, tensor in state.items()},
        lambda state: {key: tensor.double() for key, tensor in state.items()},
    ],
    ids=[
        "bare",
        "detectron2",
        "mmseg",
        "DDP",
        "wrapped DDP",
        "compiled DDP",
        "DDP of compiled",
        "parameters",
        "float64",
    ],
)
def test_wrappings(model: nn.Module, other: nn.Module, wrap) -> None:
    checkpoints.load_upstream(other, wrap(checkpoints.to_upstream(model)))
    assert_same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_values_are_cast(model: nn.Module, other: nn.Module, dtype: torch.dtype) -> None:
    state = {key: tensor.to(dtype) for key, tensor in checkpoints.to_upstream(model).items()}
    checkpoints.load_upstream(other, state)
    assert_same(other.state_dict(), {key: tensor.to(dtype).float() for key, tensor in model.state_dict().items()})


def test_a_half_precision_model_stays_in_half_precision(model: nn.Module, other: nn.Module) -> None:
    checkpoints.load_upstream(other.half(), checkpoints.to_upstream(model))
    assert_same(other.state_dict(), copy_of(model.half().state_dict()))
    assert {tensor.dtype for tensor in checkpoints.to_upstream(other).values()} == {torch.float16}


def test_derived_buffers_may_be_missing_or_anything(model: nn.Module, other: nn.Module) -> None:
    state = checkpoints.to_upstream(model)
    derived = [key for key in state if matches_any(model.upstream_derived, key)]
    assert len(derived) == (2 if isinstance(model, CATSeg) else 1)
    for value in (None, torch.full((3,), float("nan")), torch.ones(2, dtype=torch.int64)):
        changed = {key: value if key in derived else tensor for key, tensor in state.items()}
        checkpoints.load_upstream(other, {key: tensor for key, tensor in changed.items() if tensor is not None})
        assert_same(other.state_dict(), model.state_dict())


def test_made_up_shift_mask_is_the_golden_one() -> None:
    golden = np.load(Path(make_weights.__file__).parent / "catseg_ops.npz")
    assert fill.rel_err(golden, "swin_shift.attn_mask", make_weights.shift_mask(windows=4, window=12)) == 0


def test_a_map_within_one_window_has_no_shift_mask() -> None:
    model = CATSeg(replace(get_preset("catseg-tiny").config, window=12))
    assert not any("attn_mask" in key for key in checkpoints.to_upstream(model))


def test_loading_invalidates_caches_of_the_weights(model: nn.Module, other: nn.Module) -> None:
    before = {name: parameter._version for name, parameter in other.named_parameters()}
    checkpoints.load_upstream(other, checkpoints.to_upstream(model))
    assert all(parameter._version > before[name] for name, parameter in other.named_parameters())


def misfits(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str], list[str], list[str]]:
    """A changed state dict, and its missing, unexpected and mis-shaped keys."""
    if CATSEG_PREFIX + "transformer.conv1.weight" in state:
        missing = [CATSEG_PREFIX + "transformer.layers.1.attention.padding_tokens", "upsample2.bias"]
        mismatched = [CATSEG_PREFIX + "clip_model.visual.proj", CATSEG_PREFIX + "transformer.head.bias"]
    else:
        missing = ["backbone.ln_layers.2.weight", "backbone.transformer.resblocks.3.attn.in_proj_weight"]
        mismatched = ["text_encoder.transformer.resblocks.0.attn.in_proj_weight", "backbone.ln_layers.0.bias"]
    changed = {key: tensor for key, tensor in state.items() if key not in missing}
    changed |= {key: torch.cat([state[key], state[key]]) for key in mismatched}
    changed |= {"pixel_mean": torch.zeros(3, 1, 1), "backbone.extra.weight": torch.zeros(2)}
    return changed, missing, ["pixel_mean", "backbone.extra.weight"], mismatched


def test_every_mismatch_is_named_and_nothing_changes(model: nn.Module, other: nn.Module) -> None:
    changed, missing, unexpected, mismatched = misfits(checkpoints.to_upstream(model))
    before = copy_of(other.state_dict())
    error = refused(checkpoints.load_upstream, other, {"model": changed})
    assert isinstance(error, ValueError)
    assert set(error.missing) == set(missing)
    assert set(error.unexpected) == set(unexpected)
    assert set(error.mismatched) == set(mismatched)
    sentence, *lines = str(error).splitlines()
    assert "2 missing, 2 unexpected, 2 of another shape" in sentence and model.preset in sentence
    assert len(lines) == 6
    for key in [*missing, *unexpected, *mismatched]:
        assert sum(key in line for line in lines) == 1
    assert_same(other.state_dict(), before)


@pytest.mark.parametrize("kind", ["missing", "unexpected", "mismatched"])
def test_each_kind_of_mismatch_alone(model: nn.Module, kind: str) -> None:
    state = checkpoints.to_upstream(model)
    key = next(key for key, tensor in state.items() if tensor.dim() == 2)
    if kind == "missing":
        del state[key]
    elif kind == "mismatched":
        state[key] = state[key].t()[:-1]
    else:
        state[key := f"{key}_more"] = torch.zeros(1)
    error = refused(checkpoints.load_upstream, model, state)
    found = {"missing": error.missing, "unexpected": error.unexpected, "mismatched": error.mismatched}
    assert found.pop(kind) == (key,) and set(found.values()) == {()}
    assert "(keys: 1 " in str(error)


@pytest.mark.parametrize("preset", make_weights.PRESETS)
@pytest.mark.parametrize("name", TINY)
def test_a_checkpoint_of_another_model_is_recognised(name: str, preset: str) -> None:
    error = refused(checkpoints.load_upstream, build(name), placeholders(preset))
    assert f"it looks like a checkpoint of {preset}; load it with that model" in str(error)


@pytest.mark.parametrize("prompts, preset", [(35, "cascade-clip-vitb-context"), (10, "cascade-clip-vitb-voc")])
def test_prompts_distinguish_the_cascade_clip_presets(prompts: int, preset: str) -> None:
    state = placeholders("cascade-clip-vitb")
    for key, shape in (("prompt_embeddings", (1, prompts, 768)), ("deep_prompt_embeddings", (11, prompts, 768))):
        state[f"backbone.{key}"] = torch.ones(()).expand(shape)
    error = refused(checkpoints.load_upstream, build_empty("cascade-clip-vitb"), state)
    assert f"checkpoint of {preset};" in str(error)
    assert set(error.mismatched) == {"backbone.prompt_embeddings", "backbone.deep_prompt_embeddings"}


def test_an_incomplete_checkpoint_of_the_same_model_is_recognised() -> None:
    state = placeholders("catseg-vitb")
    del state["upsample1.bias"]
    error = refused(checkpoints.load_upstream, build_empty("catseg-vitb"), state)
    assert "incomplete or altered checkpoint of catseg-vitb" in str(error)


def test_clip_alone_and_own_formats_are_recognised(rng: torch.Generator) -> None:
    model = build_random("catseg-tiny", rng)
    prefix = CATSEG_PREFIX + "clip_model."
    state = checkpoints.to_upstream(model)
    clip = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    assert "OpenAI's CLIP" in str(refused(checkpoints.load_upstream, model, clip))
    assert "checkpoints.load reads it" in str(refused(checkpoints.load_upstream, model, model.state_dict()))
    assert "get a checkpoint of catseg-tiny" in str(
        refused(checkpoints.load_upstream, model, {"backbone.layer1.weight": torch.zeros(3)})
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_that_are_not_finite_are_refused(model: nn.Module, value: float, dtype: torch.dtype) -> None:
    state = {key: tensor.to(dtype) for key, tensor in checkpoints.to_upstream(model).items()}
    key = [key for key in state if not matches_any(model.upstream_derived, key)][-1]
    state[key].view(-1)[-1] = value
    before = copy_of(model.state_dict())
    error = refused(checkpoints.load_upstream, model, state)
    assert "NaN or infinite" in str(error) and f"'{key}'" in str(error)
    assert_same(model.state_dict(), before)


def test_values_whose_sum_overflows_are_accepted(model: nn.Module) -> None:
    state = {key: torch.full_like(tensor, 3e38) for key, tensor in checkpoints.to_upstream(model).items()}
    checkpoints.load_upstream(model, state)
    assert all((tensor == 3e38).all() for tensor in model.state_dict().values())


def test_other_things_than_tensors_are_refused(model: nn.Module) -> None:
    state = checkpoints.to_upstream(model)
    key = next(iter(state))
    assert "int8" in str(refused(checkpoints.load_upstream, model, state | {key: state[key].to(torch.int8)}))
    assert "'note' (str)" in str(refused(checkpoints.load_upstream, model, state | {"note": "text"}))
    assert "empty" in str(refused(checkpoints.load_upstream, model, {}))
    assert "empty" in str(refused(checkpoints.load_upstream, model, {"model": {}}))
    with pytest.raises(TypeError, match="state_dict must be a dict of tensors, got list"):
        checkpoints.load_upstream(model, [])
    for call in (checkpoints.load_upstream, checkpoints.load, checkpoints.save):
        with pytest.raises(TypeError, match="model must be a SegmentationModel, got Linear"):
            call(nn.Linear(2, 2), {})
