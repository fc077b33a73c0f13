"""Checkpoints: upstream's released layouts and this package's own, in both directions, strictly.

Own files are safetensors with the names of `model.state_dict()` and, in their metadata, the preset's name and the class
list. Upstream's are what its training code saves; `upstream_names` says how their layout differs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..data.vocabularies import VOCABULARIES
from ..files import write_whole
from ..models import CascadeCLIP, CATSeg, get_preset
from ..models.token_table import compact, expand
from ..ops.spatial_aggregation import window_layout
from ..vocabulary import check_classes
from .files import CheckpointError, first_of, read, read_metadata, unwrap
from .upstream import (
    CASCADE_EMPTY_WEIGHT,
    CASCADE_RULES,
    CATSEG_MASK,
    CATSEG_RULES,
    Stored,
    is_derived,
    own_layout,
    recognise,
    upstream_layout,
)

__all__ = ["CheckpointError", "classes", "download", "load", "load_upstream", "read", "save", "to_upstream"]

Model: TypeAlias = CATSeg | CascadeCLIP

FORMAT, VERSION = "ovseg-fast", "1"  # in the metadata of own files
HUB_REPOSITORY = "hamacojr/CAT-Seg-weights"  # a Space
HUB_PAGE = f"https://huggingface.co/spaces/{HUB_REPOSITORY}"
NO_OBJECT_WEIGHT = 0.1  # MaskFormer's weight of the class "no object"


def load_upstream(model: Model, state_dict: Mapping[str, Any]) -> None:
    """Fill a model from an upstream state dict, all of it or nothing.

    Args:
        model: the model to fill; values are cast to its dtype and go to its device.
        state_dict: upstream's names and tensors, bare or as detectron2 (`{"model": ...}`) and mmseg (`{"state_dict":
            ...}`) wrap it, with or without the `module.` of distributed training. The buffers `attn_mask` and
            `empty_weight`, which follow from the configuration, are ignored.

    Raises:
        CheckpointError: keys are missing, unexpected or of another shape, all of them named; or values are not finite.
            The model is as it was.
        TypeError: `model` or `state_dict` is something else.
    """
    layout = _upstream_layout(model)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a dict of tensors, got {type(state_dict).__name__}.")
    _fill(model, unwrap(state_dict, "the checkpoint"), layout, "the checkpoint")


@torch.no_grad()
def to_upstream(model: Model) -> dict[str, Tensor]:
    """A model's weights under upstream's names and in its shapes, derived buffers included: copies, on its device.

    Raises:
        TypeError: `model` is something else.
    """
    layout, tensors = _upstream_layout(model), model.state_dict()
    state = {
        key: torch.cat([part.reshape(-1) for part in _parts(tensors, stored)]).view(stored.shape)
        for key, stored in layout.items()
    }
    return state | _derived_buffers(model)


def save(
    model: Model, path: str | os.PathLike[str], classes: Sequence[str] | None = None, *, half: bool = False
) -> None:
    """Save a model in this package's own format, whole or not at all.

    Args:
        path: a file ending in `.safetensors`.
        classes: names of the T classes that the model was trained on, to be kept with it.
        half: in float16, which takes half the space and rounds the weights.

    Raises:
        ValueError, TypeError: `path` ends otherwise, `classes` are no names, or `model` is something else.
        OSError: the file cannot be written.
    """
    _check_model(model)
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got '{path}'.")
    metadata = {"format": FORMAT, "version": VERSION}
    if model.preset is not None:
        metadata["preset"] = model.preset
    if classes is not None:
        metadata["classes"] = json.dumps(check_classes(classes), ensure_ascii=False)
    tensors: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in compact(model.state_dict()).items():
        tensor = tensor.cpu().contiguous()
        if half and tensor.is_floating_point():
            tensor = tensor.half()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor  # safetensors refuses shared memory
        storages.add(storage)

    def write(temporary: Path) -> None:
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        temporary.chmod(mode)  # safetensors makes files that only their owner may read

    write_whole(path, write)


def load(model: Model, path: str | os.PathLike[str]) -> dict[str, str]:
    """Fill a model from a file, in upstream's layout or this package's own, all of it or nothing.

    Args:
        model: the model to fill; values are cast to its dtype and go to its device.
        path: a PyTorch or safetensors file. Its content tells the layout, not its name.

    Returns:
        The file's metadata. Own files have `format`, `version` and, where known, `preset` and `classes` (a JSON list,
        see `classes`); PyTorch files have none.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged, no checkpoint, or of another model. The model is as it was.
        TypeError: `model` is something else.
    """
    layout, own = _upstream_layout(model), own_layout(_shapes(model.state_dict()))
    state, metadata = read(path)
    try:
        state = expand(state)
    except ValueError as error:
        raise CheckpointError(f"'{path}' is damaged: {error}") from error
    if metadata.get("format") == FORMAT:
        _check_metadata(metadata, model, path)
        layout = own
    elif sum(key in own for key in state) > sum(key in layout for key in state):
        layout = own  # saved by torch.save(model.state_dict())
    _fill(model, state, layout, f"'{path}'")
    return metadata


def classes(path: str | os.PathLike[str]) -> list[str] | None:
    """The class list kept in an own file, or None where there is none.

    Raises:
        FileNotFoundError: no such file. CheckpointError: the file is damaged or no checkpoint.
    """
    metadata = read_metadata(path)
    if metadata.get("format") != FORMAT or "classes" not in metadata:
        return None
    try:
        return check_classes(json.loads(metadata["classes"]))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"'{path}' holds a damaged class list; save it again.") from error


def download(preset_name: str) -> Path:
    """The weights of a preset: those in this package, or the published ones from the Hugging Face hub or its cache.

    The hub's own settings hold, such as `HF_HOME` for the cache and `HF_HUB_OFFLINE=1` for using nothing but it.

    Raises:
        ValueError: no such preset, or nothing is published for it on the hub.
        ConnectionError: the file is not in the cache and cannot be downloaded.
    """
    preset = get_preset(preset_name)
    if preset.packaged is not None:
        return preset.packaged
    file = preset.weights_file
    if file is None:
        where = ", whose authors share theirs elsewhere" if preset.method == "cascade-clip" else ""
        raise ValueError(
            f"the hub holds no weights of {preset_name}{where}; pass a file as weights, or None for random weights."
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(HUB_REPOSITORY, file, repo_type="space"))
    except Exception as error:  # requests', httpx' or xet's own, depending on the hub's version
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set and the hub's cache does not hold it"
        else:
            reason = str(error.__cause__ or error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise ConnectionError(
            f"cannot download {file}, the weights of {preset_name} ({reason}); they are published at {HUB_PAGE}, and "
            f'weights="{file}" loads a copy on disk.'
        ) from error


def _check_model(model: object) -> None:
    if not isinstance(model, (CATSeg, CascadeCLIP)):
        raise TypeError(f"model must be a CATSeg or a CascadeCLIP, got {type(model).__name__}.")


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def _upstream_layout(model: Model) -> dict[str, Stored]:
    _check_model(model)
    rules = CATSEG_RULES if isinstance(model, CATSeg) else CASCADE_RULES
    return upstream_layout(rules, _shapes(model.state_dict()))


def _parts(tensors: Mapping[str, Tensor], stored: Stored) -> list[Tensor]:
    """Views of the model's tensors, or rows of them, that one tensor of a checkpoint holds."""
    return [tensors[name] if row is None else tensors[name][row] for name, row in stored.parts]


def _derived_buffers(model: Model) -> dict[str, Tensor]:
    """Buffers that upstream saves although they follow from the configuration."""
    like = next(model.parameters())
    if isinstance(model, CascadeCLIP):
        weight = like.new_ones(len(VOCABULARIES[model.config.training_classes].seen) + 1)
        weight[-1] = NO_OBJECT_WEIGHT
        return {CASCADE_EMPTY_WEIGHT: weight}
    side, window = model.config.image_size // model.clip.visual.patch, model.config.window
    if side <= window:  # one window, nothing to shift
        return {}
    mask = window_layout(side, side, window, window // 2, like.device, like.dtype)[2]
    assert mask is not None  # a shift always leaves neighbours to be kept apart
    return {
        CATSEG_MASK.format(layer): mask.clone(memory_format=torch.contiguous_format)
        for layer in range(model.config.layers)
    }


@torch.no_grad()
def _fill(model: Model, state: dict[str, Tensor], layout: Mapping[str, Stored], what: str) -> None:
    """Check everything, then copy, so that a model is never half filled."""
    state = {key: tensor for key, tensor in state.items() if not is_derived(key)}
    _check_fit(state, layout, model.preset or type(model).__name__, what)
    _check_values(state, what)
    targets = model.state_dict()
    for key, stored in layout.items():
        parts = _parts(targets, stored)
        pieces = state[key].reshape(-1).split([part.numel() for part in parts])
        for part, piece in zip(parts, pieces, strict=True):
            part.copy_(piece.view(part.shape))


def _check_fit(state: Mapping[str, Tensor], layout: Mapping[str, Stored], name: str, what: str) -> None:
    """Refuse a checkpoint that is not the model's, naming every key."""
    missing = [key for key in layout if key not in state]
    unexpected = [key for key in state if key not in layout]
    mismatched = [key for key in layout if key in state and tuple(state[key].shape) != layout[key].shape]
    if not (missing or unexpected or mismatched):
        return
    counts = {"missing": len(missing), "unexpected": len(unexpected), "of another shape": len(mismatched)}
    keys = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    look = recognise(_shapes(state))
    if look is None:
        advice = f"get a checkpoint of {name}"
    elif look.name == name:
        advice = f"it looks like an incomplete or altered checkpoint of {name}; get the original one"
    else:
        advice = f"it looks like a checkpoint of {look.name}; {look.advice}"
    lines = [
        f"{what} does not fit {name} (keys: {keys}): {advice}.",
        *(f"missing: {key} {layout[key].shape}" for key in missing),
        *(f"unexpected: {key} {tuple(state[key].shape)}" for key in unexpected),
        *(f"another shape: {key} {tuple(state[key].shape)}, expected {layout[key].shape}" for key in mismatched),
    ]
    raise CheckpointError("\n".join(lines), missing, unexpected, mismatched)


def _check_values(state: Mapping[str, Tensor], what: str) -> None:
    """Refuse values that are no numbers to compute with."""
    integers = [f"'{key}' ({tensor.dtype})" for key, tensor in state.items() if not tensor.is_floating_point()]
    if integers:
        raise CheckpointError(f"{what} must hold floating-point tensors, got {first_of(integers)}.")
    broken = [f"'{key}'" for key, tensor in state.items() if not _is_finite(tensor)]
    if broken:
        raise CheckpointError(
            f"{what} holds NaN or infinite values in {first_of(broken)}: its training diverged or the file is "
            "damaged; use another checkpoint."
        )


def _is_finite(tensor: Tensor) -> bool:
    values = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    # A sum reads the values once and keeps every NaN and Inf; only where it overflows they are looked at one by one.
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def _check_metadata(metadata: Mapping[str, str], model: Model, path: str | os.PathLike[str]) -> None:
    version, preset = metadata.get("version"), metadata.get("preset")
    if version != VERSION:
        raise CheckpointError(
            f"'{path}' is of format version {version}, this ovseg-fast reads version {VERSION}; install a newer one."
        )
    if preset is not None and model.preset is not None and preset != model.preset:
        raise CheckpointError(f"'{path}' holds {preset}, the model is {model.preset}; load it as {preset}.")
