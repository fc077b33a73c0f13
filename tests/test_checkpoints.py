"""Checkpoints: names and layouts in both directions, strictness, broken files, own format, download."""

from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from ovseg_fast import checkpoints, upstream_names
from ovseg_fast.checkpoints import CheckpointError
from ovseg_fast.models import CATSeg, build, get_preset
from parity import fill, make_weights

TINY = ("catseg-tiny", "cascade-clip-tiny")
CATSEG_PREFIX = "sem_seg_head.predictor."
RULES = {"catseg": upstream_names.CATSEG_RULES, "cascade": upstream_names.CASCADE_RULES}


def build_empty(name: str) -> nn.Module:
    """A model without the time that random initialisation takes."""
    with torch.device("meta"):
        return build(name)


def build_random(name: str, rng: torch.Generator) -> nn.Module:
    """A model in which no tensor is constant, so that mixed-up tensors are noticed."""
    model = build(name).eval()
    for tensor in model.state_dict().values():
        tensor.normal_(generator=rng)
    return model


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def placeholders(preset: str) -> dict[str, torch.Tensor]:
    """A full-size checkpoint that takes no memory."""
    return {name: torch.ones(()).expand(shape) for name, shape in make_weights.shapes(preset).items()}


def copy_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in state.items()}


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(state) == set(expected)
    for key, tensor in expected.items():
        assert state[key].shape == tensor.shape and state[key].dtype == tensor.dtype, key
        assert torch.equal(state[key], tensor), key


def refused(call, *arguments) -> CheckpointError:
    """The error of a call, whose first line is one sentence."""
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    sentence = str(caught.value).splitlines()[0]
    assert sentence.endswith(".") and "Traceback" not in sentence and len(sentence) < 400
    return caught.value


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest, rng: torch.Generator) -> nn.Module:
    return build_random(request.param, rng)


@pytest.fixture
def other(model: nn.Module) -> nn.Module:
    """A second model of the same make with other weights."""
    return build(model.preset).eval()


# ------------------------------------------------------------------------------------------------ names and layouts


@pytest.mark.parametrize("preset", make_weights.PRESETS)
def test_every_upstream_key_has_its_place_and_back(preset: str) -> None:
    ours, upstream = shapes_of(build_empty(preset)), make_weights.shapes(preset)
    keys = json.loads((Path(make_weights.__file__).parent / make_weights.PRESETS[preset][0]).read_text())
    assert [key for key in upstream if upstream_names.is_derived(key)] == keys["buffers"]

    layout = upstream_names.upstream_layout(RULES[preset.split("-")[0]], ours)
    assert {key: stored.shape for key, stored in layout.items()} == {
        key: shape for key, shape in upstream.items() if key not in keys["buffers"]
    }
    places = [part for stored in layout.values() for part in stored.parts]
    stacked = ("image_encoder.norm_weight", "image_encoder.norm_bias")
    expected = {name: list(range(shape[0])) if name in stacked else [None] for name, shape in ours.items()}
    assert {name: [row for owner, row in places if owner == name] for name in ours} == expected


@pytest.mark.parametrize("preset", ["catseg-vitb", "cascade-clip-vitb"])
def test_no_rule_is_idle(preset: str) -> None:
    rules, shapes = RULES[preset.split("-")[0]], shapes_of(build_empty(preset))
    layout = upstream_names.upstream_layout(rules, shapes)
    for left_out in rules:
        try:
            without = upstream_names.upstream_layout([rule for rule in rules if rule != left_out], shapes)
        except ValueError:
            continue
        assert without != layout, f"idle: {left_out}"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'adapter\.weight'"):
        upstream_names.upstream_layout(upstream_names.CATSEG_RULES, {"adapter.weight": (3, 4)})


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


def test_to_upstream_gives_copies(model: nn.Module) -> None:
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


# ------------------------------------------------------------------------------------------ what load_upstream accepts


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


def test_a_half_precision_model_stays_one(model: nn.Module, other: nn.Module) -> None:
    checkpoints.load_upstream(other.half(), checkpoints.to_upstream(model))
    assert_same(other.state_dict(), copy_of(model.half().state_dict()))
    assert {tensor.dtype for tensor in checkpoints.to_upstream(other).values()} == {torch.float16}


def test_derived_buffers_may_be_missing_or_anything(model: nn.Module, other: nn.Module) -> None:
    state = checkpoints.to_upstream(model)
    derived = [key for key in state if upstream_names.is_derived(key)]
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


def test_loading_is_seen_by_caches_of_the_weights(model: nn.Module, other: nn.Module) -> None:
    before = {name: parameter._version for name, parameter in other.named_parameters()}
    checkpoints.load_upstream(other, checkpoints.to_upstream(model))
    assert all(parameter._version > before[name] for name, parameter in other.named_parameters())


# --------------------------------------------------------------------------------------------------- what it refuses


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


def test_every_misfit_is_named_and_nothing_is_changed(model: nn.Module, other: nn.Module) -> None:
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
def test_each_kind_of_misfit_alone(model: nn.Module, kind: str) -> None:
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
def test_prompts_tell_the_cascade_clip_presets_apart(prompts: int, preset: str) -> None:
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


def test_clip_alone_and_own_layouts_are_recognised(rng: torch.Generator) -> None:
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
    key = [key for key in state if not upstream_names.is_derived(key)][-1]
    state[key].view(-1)[-1] = value
    before = copy_of(model.state_dict())
    error = refused(checkpoints.load_upstream, model, state)
    assert "NaN or infinite" in str(error) and f"'{key}'" in str(error)
    assert_same(model.state_dict(), before)


def test_values_whose_sum_overflows_are_finite(model: nn.Module) -> None:
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
        with pytest.raises(TypeError, match="model must be a CATSeg or a CascadeCLIP, got Linear"):
            call(nn.Linear(2, 2), {})


# -------------------------------------------------------------------------------------------------------------- files

STATE = {"layer.weight": torch.linspace(-1, 1, 4000).view(50, 80), "layer.bias": torch.ones(50)}


def save_zip(path: Path) -> None:
    torch.save({"model": STATE}, path)


def save_legacy(path: Path) -> None:
    torch.save({"state_dict": STATE, "meta": {"epoch": 3}}, path, _use_new_zipfile_serialization=False)


def save_safetensors(path: Path) -> None:
    safetensors.torch.save_file(STATE, path)


WRITERS = pytest.mark.parametrize("writer", [save_zip, save_legacy, save_safetensors])


@WRITERS
@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "model"])
def test_read_goes_by_content(tmp_path: Path, writer, name: str) -> None:
    writer(tmp_path / name)
    state, metadata = checkpoints.read(tmp_path / name)
    assert_same(state, STATE)
    assert metadata == {}
    assert_same(checkpoints.read(str(tmp_path / name))[0], STATE)


@WRITERS
def test_truncated_files(tmp_path: Path, writer, rng: torch.Generator) -> None:
    writer(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    few = torch.randint(1000, len(content), (20,), generator=rng).tolist()
    for length in [*range(1, 1000, 7), *few, len(content) - 100, len(content) - 1]:
        path = tmp_path / "cut.pth"
        path.write_bytes(content[:length])
        error = refused(checkpoints.read, path)
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
        assert "damaged" in str(error), length


def test_a_truncated_checkpoint_leaves_the_model_alone(tmp_path: Path, model: nn.Module) -> None:
    path = tmp_path / "model.pth"
    torch.save({"model": checkpoints.to_upstream(model)}, path)
    os.truncate(path, path.stat().st_size * 3 // 4)
    before = copy_of(model.state_dict())
    assert "cut short" in str(refused(checkpoints.load, model, path))
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "empty"),
        (b"some text\nof several lines\n" * 100, "text file"),
        ("Gewichte für das Modell".encode(), "text file"),
        (b"<!DOCTYPE html>\n<html lang='en'><head><title>Sign in</title>", "web page"),
        (b"\xef\xbb\xbf\n <html>\n", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 617999127\n", "Git LFS"),
        (b'{"weights": []}', "text file"),
        (b"\x00" * 5000, "neither"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\xff\xfe", "neither"),
        (b"\x80\x04" + b"\xfe" * 50, "damaged"),
        (b"PK\x03\x04" + b"\x17" * 500, "damaged"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{not json at all", "damaged"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff{", "damaged"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    error = refused(checkpoints.read, path)
    assert words in str(error) and str(path) in str(error) and len(str(error).splitlines()) == 1


def test_other_archives_pickles_and_contents(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.pth", "content")
    assert "zip archive" in str(refused(checkpoints.read, path))
    with zipfile.ZipFile(path, "w") as archive:  # the parts by which torch tells a TorchScript program
        for part in ("data.pkl", "constants.pkl", "version"):
            archive.writestr(f"ViT-B-16/{part}", "content")
    assert "TorchScript" in str(refused(checkpoints.read, path))
    path.write_bytes(pickle.dumps({"a": [1, 2]}, protocol=4))
    assert "damaged" in str(refused(checkpoints.read, path))
    torch.save([torch.zeros(2)], path)
    assert "got a list" in str(refused(checkpoints.read, path))
    torch.save({"net": STATE, "epoch": 3}, path)
    assert "'net' (dict), 'epoch' (int)" in str(refused(checkpoints.read, path))
    assert "folder" in str(refused(checkpoints.read, tmp_path))
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint file '.*nothing\.pth'"):
        checkpoints.read(tmp_path / "nothing.pth")


class Intruder:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, zipped: bool) -> None:
    path, marker = tmp_path / "model.pth", tmp_path / "was_run"
    torch.save({"model": STATE, "hook": Intruder(marker)}, path, _use_new_zipfile_serialization=zipped)
    error = refused(checkpoints.read, path)
    assert "Python objects" in str(error) and "mkdir" in str(error) and str(path) in str(error)
    assert not marker.exists()


def test_code_in_a_plain_pickle_is_not_run(tmp_path: Path) -> None:
    path, marker = tmp_path / "model.pkl", tmp_path / "was_run"
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(Intruder(marker), protocol))
        refused(checkpoints.read, path)
    assert not marker.exists()


# --------------------------------------------------------------------------------------------------------- own format


def test_own_format_round_trip(tmp_path: Path, model: nn.Module, other: nn.Module) -> None:
    path, names = tmp_path / "model.safetensors", ["Katze", "grass, lawn", "空"]
    checkpoints.save(model, path, names)
    metadata = checkpoints.load(other, path)
    assert_same(other.state_dict(), model.state_dict())
    assert metadata["format"] == "ovseg-fast" and metadata["version"] == "1"
    assert metadata["preset"] == model.preset and json.loads(metadata["classes"]) == names
    assert checkpoints.classes(path) == names
    assert_same(safetensors.torch.load_file(path), model.state_dict())
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_own_format_without_classes_or_preset(tmp_path: Path, model: nn.Module, other: nn.Module) -> None:
    path, preset = tmp_path / "model.safetensors", model.preset
    model.preset = None
    checkpoints.save(model, path)
    assert checkpoints.classes(path) is None
    assert "preset" not in checkpoints.load(other, path)
    assert_same(other.state_dict(), model.state_dict())
    model.preset = preset
    checkpoints.save(model, path)
    other.preset = None
    assert checkpoints.load(other, path)["preset"] == preset


def test_own_format_keeps_dtype_layout_and_shared_tensors(tmp_path: Path, rng: torch.Generator) -> None:
    model, path = build_random("catseg-tiny", rng).to(torch.bfloat16), tmp_path / "model.safetensors"
    model.to(memory_format=torch.channels_last)
    model.aggregator.layers[1].classes.q.bias = model.aggregator.layers[1].classes.k.bias
    checkpoints.save(model, path)
    assert_same(checkpoints.read(path)[0], model.state_dict())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_load_reads_upstreams_layout_from_any_file(
    tmp_path: Path, model: nn.Module, other: nn.Module, suffix: str
) -> None:
    path, state = tmp_path / f"model{suffix}", checkpoints.to_upstream(model)
    if suffix == ".pth":
        torch.save({"model": state}, path)
    else:
        safetensors.torch.save_file(state, path, {"format": "pt"})
    checkpoints.load(other, path)
    assert_same(other.state_dict(), model.state_dict())
    assert checkpoints.classes(path) is None


def test_load_reads_a_plain_state_dict(tmp_path: Path, model: nn.Module, other: nn.Module) -> None:
    path = tmp_path / "epoch_3.pth"
    state = {f"_orig_mod.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save({"model": state, "optimizer": torch.optim.AdamW(model.parameters()).state_dict()}, path)
    assert checkpoints.load(other, path) == {}
    assert_same(other.state_dict(), model.state_dict())
    torch.save({key: tensor for key, tensor in model.state_dict().items() if "ln_post" not in key}, path)
    assert all("ln_post" in key for key in refused(checkpoints.load, other, path).missing)


def test_load_refuses_another_model(tmp_path: Path, rng: torch.Generator) -> None:
    catseg, cascade = (build_random(name, rng) for name in TINY)
    path = tmp_path / "model.safetensors"
    checkpoints.save(catseg, path)
    before = copy_of(cascade.state_dict())
    error = refused(checkpoints.load, cascade, path)
    assert f"'{path}' holds catseg-tiny, the model is cascade-clip-tiny" in str(error)
    catseg.preset = None
    checkpoints.save(catseg, path)
    error = refused(checkpoints.load, cascade, path)
    assert "CAT-Seg in ovseg-fast's own layout" in str(error) and error.missing and error.unexpected
    torch.save({"model": checkpoints.to_upstream(catseg)}, path)
    error = refused(checkpoints.load, cascade, path)
    assert f"'{path}' does not fit cascade-clip-tiny" in str(error) and "checkpoint of CAT-Seg;" in str(error)
    assert_same(cascade.state_dict(), before)


def test_load_refuses_another_version_nan_and_damaged_class_lists(tmp_path: Path, model: nn.Module) -> None:
    path, state = tmp_path / "model.safetensors", copy_of(model.state_dict())
    safetensors.torch.save_file(state, path, {"format": "ovseg-fast", "version": "2"})
    assert "format version 2" in str(refused(checkpoints.load, model, path))
    for damaged in ("[", "3", '[""]', "[1]"):
        safetensors.torch.save_file(state, path, {"format": "ovseg-fast", "version": "1", "classes": damaged})
        assert "class list" in str(refused(checkpoints.classes, path))
    state[list(state)[-1]].view(-1)[0] = float("nan")
    safetensors.torch.save_file(state, path, {"format": "ovseg-fast", "version": "1"})
    assert "NaN" in str(refused(checkpoints.load, model, path))


def test_save_is_whole_or_not_at_all(tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    checkpoints.save(model, path, ["cat"])
    before = path.read_bytes()

    def fail_halfway(tensors, file, metadata):
        Path(file).write_bytes(before[:1000])
        raise safetensors.SafetensorError("no space left on device")

    monkeypatch.setattr(checkpoints, "save_file", fail_halfway)
    with pytest.raises(OSError, match="no space left on device"):
        checkpoints.save(model, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_saved_files_have_the_usual_mode(tmp_path: Path, model: nn.Module) -> None:
    checkpoints.save(model, tmp_path / "model.safetensors")
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE(entry.stat().st_mode) for entry in tmp_path.iterdir()}
    assert len(modes) == 1


def test_save_refuses_bad_arguments(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"path must end in \.safetensors, got '.*model\.pth'"):
        checkpoints.save(model, tmp_path / "model.pth")
    with pytest.raises(TypeError, match="classes must be a list of names"):
        checkpoints.save(model, tmp_path / "model.safetensors", "cat")
    with pytest.raises(ValueError, match="at least one name"):
        checkpoints.save(model, tmp_path / "model.safetensors", [])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoints.save(model, tmp_path / "nowhere" / "model.safetensors")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------- download


def run_download(home: Path, **environment: str) -> str:
    """What `download("catseg-vitb")` gives in a fresh process, whose hub settings are read at import."""
    code = """
        import time
        time.sleep = lambda seconds: None  # the hub tries again for half a minute
        from ovseg_fast import checkpoints
        try:
            print("path", checkpoints.download("catseg-vitb"))
        except OSError as error:
            print(type(error).__name__, error)
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
    kept = {key: value for key, value in kept.items() if not key.lower().endswith("_proxy")}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=kept | {"HF_HOME": str(home)} | environment,
        cwd=tempfile.gettempdir(),  # from the repository root, Python would import its folders
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


OFFLINE = {"HF_HUB_OFFLINE": "1"}
NO_NETWORK = {"HF_ENDPOINT": "http://127.0.0.1:9"}


@pytest.mark.parametrize("environment", [OFFLINE, NO_NETWORK], ids=["offline", "no network"])
def test_download_without_network_says_so_in_one_sentence(tmp_path: Path, environment: dict[str, str]) -> None:
    output = run_download(tmp_path, **environment)
    assert len(output.splitlines()) == 1
    assert output.startswith("ConnectionError cannot download model_base.pth, the weights of catseg-vitb")
    assert "https://huggingface.co/spaces/hamacojr/CAT-Seg-weights" in output
    assert 'weights="model_base.pth"' in output
    assert ("HF_HUB_OFFLINE is set" in output) == (environment is OFFLINE)


@pytest.mark.parametrize("environment", [OFFLINE, NO_NETWORK], ids=["offline", "no network"])
def test_download_finds_the_cached_file_without_network(tmp_path: Path, environment: dict[str, str]) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "spaces--hamacojr--CAT-Seg-weights"
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    blob, pointer = repository / "blobs" / "abc", repository / "snapshots" / commit / "model_base.pth"
    torch.save({"model": STATE}, blob)
    pointer.symlink_to(Path("../../blobs/abc"))
    kind, _, path = run_download(tmp_path, **environment).partition(" ")
    assert kind == "path" and Path(path) == pointer
    assert_same(checkpoints.read(path)[0], STATE)


def test_presets_without_published_weights() -> None:
    with pytest.raises(ValueError, match="no weights of cascade-clip-vitb, whose authors share theirs elsewhere"):
        checkpoints.download("cascade-clip-vitb")
    with pytest.raises(ValueError, match="no weights of cascade-clip-vitb-voc"):
        checkpoints.download("cascade-clip-vitb-voc")
    with pytest.raises(ValueError, match="name must be one of catseg-vitb"):
        checkpoints.download("catseg-vits")


# -------------------------------------------------------------------------------------------------------- make_weights


@pytest.mark.slow
def test_make_weights_writes_what_upstream_would(tmp_path: Path) -> None:
    path = tmp_path / "made_up.pth"
    command = [sys.executable, make_weights.__file__, "catseg-vitb", str(path), "--seed-salt", "Z"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tempfile.gettempdir())
    assert "MADE-UP" in result.stdout
    content = torch.load(path, weights_only=True, mmap=True)
    assert list(content) == ["model"]
    assert {key: tuple(tensor.shape) for key, tensor in content["model"].items()} == make_weights.shapes("catseg-vitb")
    assert not torch.equal(content["model"]["upsample1.bias"], make_weights.state_dict("catseg-vitb")["upsample1.bias"])
    checkpoints.load(build_empty("catseg-vitb").to_empty(device="cpu"), path)


def test_make_weights_refuses_an_unknown_folder_and_preset(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(make_weights, "state_dict", lambda preset, salt: STATE)
    for arguments in (["catseg-vitx", "a.pth"], ["catseg-vitb", str(tmp_path / "nowhere" / "a.pth")]):
        monkeypatch.setattr(sys, "argv", ["make_weights.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            make_weights.main()
        assert caught.value.code == 2
    assert "cannot write" in capsys.readouterr().err
