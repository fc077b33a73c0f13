"""Saving and loading: upstream's released formats and this package's own, in both directions, strictly.

Own files are safetensors with the names of `model.state_dict()`; their metadata holds the preset's name and the class
list. Upstream's are what its training code saves; each method has rules for how they differ, see `upstream`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_whole
from ..models import SegmentationModel, get_preset, hub
from ..models.base import unwrap as unwrap_model
from ..models.token_table import compact, expand
from ..vocabulary import check_classes
from .errors import CheckpointError
from .files import first_of, read, read_metadata, unwrap
from .tensors import FORMAT, VERSION, write_safetensors
from .upstream import Stored, matches_any, own_format, recognise, upstream_format

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def load_upstream(model: SegmentationModel, state_dict: Mapping[str, Any]) -> None:
    """Fill a model from an upstream state dict, all of it or nothing.

    Args:
        model: the model to fill, or a wrapper of it such as `torch.compile`'s; values are cast to its dtype and go to
            its device.
        state_dict: upstream's names and tensors, bare or as detectron2 (`{"model": ...}`) and mmseg (`{"state_dict":
            ...}`) wrap them, with or without the `module.` of distributed training. Buffers that follow from the
            configuration are ignored.

    Raises:
        CheckpointError: keys are missing, unexpected or of another shape, all of them named; or values are not finite.
            The model is unchanged.
        TypeError: `model` or `state_dict` is something else. ValueError: the method has no upstream format, or the
            model's weights are sharded.
    """
    model = unwrap_model(model)
    stored = _upstream_format(model)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a dict of tensors, got {type(state_dict).__name__}.")
    _fill(model, unwrap(state_dict, "the checkpoint"), stored, "the checkpoint")


@torch.no_grad()
def to_upstream(model: SegmentationModel) -> dict[str, Tensor]:
    """A model's weights under upstream's names and in its shapes, derived buffers included: copies, on its device.

    Raises:
        TypeError: `model` is something else. ValueError: the method has no upstream format.
    """
    model = unwrap_model(model)
    formats, tensors = _upstream_format(model), _tensors(model)
    state = {
        key: torch.cat([part.reshape(-1) for part in _parts(tensors, stored)]).view(stored.shape)
        for key, stored in formats.items()
    }
    return state | model.upstream_buffers()


def save(
    model: SegmentationModel, path: str | os.PathLike[str], classes: Sequence[str] | None = None, *, half: bool = False
) -> None:
    """Save a model in this package's own format, whole or not at all.

    Args:
        path: a file ending in `.safetensors`.
        classes: names of the T classes that the model was trained on, kept in the file.
        half: in float16, which takes half the space and rounds the weights.

    Raises:
        ValueError, TypeError: `path` ends otherwise, `classes` are not names, or `model` is something else.
        OSError: the file cannot be written.
    """
    model = unwrap_model(model)
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got '{path}'.")
    metadata = {"format": FORMAT, "version": VERSION}
    if model.preset is not None:
        metadata["preset"] = model.preset
    if classes is not None:
        metadata["classes"] = json.dumps(check_classes(classes), ensure_ascii=False)
    tensors = compact(_tensors(model))
    if half:
        tensors = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    write_whole(path, lambda file: write_safetensors(file, tensors, metadata))


def load(model: SegmentationModel, path: str | os.PathLike[str]) -> dict[str, str]:
    """Fill a model from a file, in upstream's format or this package's own, all of it or nothing.

    Args:
        model: the model to fill; values are cast to its dtype and go to its device.
        path: a PyTorch or safetensors file; its content tells the format, not its name.

    Returns:
        The file's metadata. Own files have `format`, `version` and, if known, `preset` and `classes` (a JSON list,
        see `classes`); PyTorch files have none.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged, not a checkpoint, or of another model. The model is unchanged.
        TypeError: `model` is something else.
    """
    model = unwrap_model(model)
    stored = own_format(_shapes(_tensors(model)))
    state, metadata = read(path)
    try:
        state = expand(state)
    except ValueError as error:
        raise CheckpointError(f"'{path}' is damaged: {error}") from error
    if metadata.get("format") == FORMAT:
        _check_metadata(metadata, model, path)
    elif model.upstream_rules:  # unless torch.save(model.state_dict()) wrote it
        upstream = _upstream_format(model)
        if sum(key in stored for key in state) <= sum(key in upstream for key in state):
            stored = upstream
    _fill(model, state, stored, f"'{path}'")
    return metadata


def classes(path: str | os.PathLike[str]) -> list[str] | None:
    """The class list in an own file, or None.

    Raises:
        FileNotFoundError: no such file. CheckpointError: the file is damaged or not a checkpoint.
    """
    metadata = read_metadata(path)
    if metadata.get("format") != FORMAT or "classes" not in metadata:
        return None
    try:
        return check_classes(json.loads(metadata["classes"]))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"'{path}' holds a damaged class list; save it again.") from error


def download(preset_name: str, *, command_line: bool = False) -> Path:
    """The weights of a preset: those in this package, or the published ones from the Hugging Face hub or its cache.

    The hub's own settings hold, such as `HF_HOME` for the cache and `HF_HUB_OFFLINE=1` for using only that.

    Args:
        preset_name: as for `ovseg_fast.load`.
        command_line: whether errors advise options of the command line instead of arguments in Python.

    Raises:
        ValueError: no such preset, or nothing is published for it on the hub.
        ConnectionError: the file is not in the cache and cannot be downloaded.
    """
    preset = get_preset(preset_name)
    if preset.packaged is not None:
        return preset.packaged
    given, random = ("--weights {}", "--weights random") if command_line else ('weights="{}"', "weights=None")
    file, space, note = preset.weights_file, preset.model.hub_space, preset.model.hub_note
    if file is None or space is None:
        known = f"the hub holds no weights of {preset_name}{note and f' ({note})'}"
        raise ValueError(f"{known}; {given.format('FILE')} loads a file, {random} gives random weights.")
    try:
        return hub.find(space, file, "space") or _fetch(space, file)
    except ConnectionError as error:
        raise ConnectionError(
            f"cannot download {file}, the weights of {preset_name} ({error}); they are published at "
            f"https://huggingface.co/spaces/{space}, and {given.format(file)} loads a copy on disk."
        ) from error


def _fetch(space: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(space, file, repo_type="space"))
    except Exception as error:  # requests', httpx' or xet's own, depending on the hub's version
        raise ConnectionError(hub.reason(error)) from error


def _tensors(model: SegmentationModel) -> dict[str, Tensor]:
    """The model's state dict, without what `torch.compile` adds to the names of compiled parts."""
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def _upstream_format(model: SegmentationModel) -> dict[str, Stored]:
    if not model.upstream_rules:
        raise ValueError(f"{type(model).__name__} has no upstream format; save and load use this package's own.")
    return upstream_format(model.upstream_rules, _shapes(_tensors(model)))


def _parts(tensors: Mapping[str, Tensor], stored: Stored) -> list[Tensor]:
    """Views of the model's tensors, or of their rows, that one tensor of a checkpoint holds."""
    return [tensors[name] if row is None else tensors[name][row] for name, row in stored.parts]


@torch.no_grad()
def _fill(model: SegmentationModel, state: dict[str, Tensor], stored: Mapping[str, Stored], what: str) -> None:
    """Check everything, then copy, so that a model is never half filled."""
    state = {key: tensor for key, tensor in state.items() if not matches_any(model.upstream_derived, key)}
    _check_fit(state, stored, model.preset or type(model).__name__, what)
    _check_values(state, what)
    targets = _tensors(model)
    if any(tensor.is_meta for tensor in targets.values()):
        raise ValueError("model must have memory for its weights, got one on 'meta'; call model.to_empty() first.")
    for key, how in stored.items():
        parts = _parts(targets, how)
        values = state[key].reshape(-1).split([part.numel() for part in parts])
        for part, value in zip(parts, values, strict=True):
            part.copy_(value.view(part.shape))


def _check_fit(state: Mapping[str, Tensor], stored: Mapping[str, Stored], name: str, what: str) -> None:
    """Refuse a checkpoint that is not the model's, naming every key."""
    missing = [key for key in stored if key not in state]
    unexpected = [key for key in state if key not in stored]
    mismatched = [key for key in stored if key in state and tuple(state[key].shape) != stored[key].shape]
    if not (missing or unexpected or mismatched):
        return
    counts = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    keys = ", ".join(f"{len(keys)} {kind}" for kind, keys in counts.items() if keys)
    look = recognise(_shapes(state))
    if look is None:
        advice = f"get a checkpoint of {name}"
    elif look.name == name:
        advice = f"it looks like an incomplete or altered checkpoint of {name}; get the original one"
    else:
        advice = f"it looks like a checkpoint of {look.name}; {look.advice}"
    lines = [
        f"{what} does not fit {name} (keys: {keys}): {advice}.",
        *(f"missing: {key} {stored[key].shape}" for key in missing),
        *(f"unexpected: {key} {tuple(state[key].shape)}" for key in unexpected),
        *(f"another shape: {key} {tuple(state[key].shape)}, expected {stored[key].shape}" for key in mismatched),
    ]
    raise CheckpointError("\n".join(lines), missing, unexpected, mismatched)


def _check_values(state: Mapping[str, Tensor], what: str) -> None:
    """Refuse values that are not finite floating-point numbers."""
    integers = [f"'{key}' ({tensor.dtype})" for key, tensor in state.items() if tensor.dtype not in FLOATS]
    if integers:
        raise CheckpointError(f"{what} must hold floating-point tensors, got {first_of(integers)}.")
    broken = [f"'{key}'" for key, tensor in state.items() if not _is_finite(tensor)]
    if broken:
        advice = "its training diverged or the file is damaged; use another checkpoint."
        raise CheckpointError(f"{what} holds NaN or infinite values in {first_of(broken)}: {advice}")


def _is_finite(tensor: Tensor) -> bool:
    values = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    # A sum reads the values once and keeps every NaN and Inf; only if it overflows are they checked one by one.
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def _check_metadata(metadata: Mapping[str, str], model: SegmentationModel, path: str | os.PathLike[str]) -> None:
    version, preset = metadata.get("version"), metadata.get("preset")
    if version != VERSION:
        raise CheckpointError(
            f"'{path}' is of format version {version}, this ovseg-fast reads version {VERSION}; install a newer one."
        )
    if preset is not None and model.preset is not None and preset != model.preset:
        raise CheckpointError(f"'{path}' holds {preset}, the model is {model.preset}; load it as {preset}.")
