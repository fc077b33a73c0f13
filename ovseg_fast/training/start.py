"""What a run starts from, and the size of its crops: checked before the first step."""

from __future__ import annotations

from pathlib import Path

import torch

from .. import checkpoints
from ..checkpoints.files import file_kind
from ..compat import ensure_importable, lacks_memory
from ..images import MAX_SIDE, MIN_SIDE
from ..models import SegmentationModel
from ..models.clip import TINY_CLIP
from ..models.presets import get_preset
from .config import TrainingConfig


def check_start(config: TrainingConfig) -> None:
    """Whether the weights to start from exist, before a model is built for them.

    Raises:
        ValueError, OSError: there is no such file, it is no checkpoint, or open_clip has no such weights.
    """
    if config.weights is not None:
        try:
            file_kind(Path(config.weights))
        except (ValueError, OSError) as error:
            raise (OSError if isinstance(error, OSError) else ValueError)(f"weights: {error}") from None
    if config.clip_pretrained is not None:
        _check_clip(config.model, config.clip_pretrained)


def load_start(model: SegmentationModel, path: str) -> None:
    """Load the weights to start from; errors as `checkpoints.load`, with the name of the key."""
    try:
        checkpoints.load(model, path)
    except checkpoints.CheckpointError as error:
        raise checkpoints.CheckpointError(
            f"weights: {error}", error.missing, error.unexpected, error.mismatched
        ) from None


def check_sizes(model: SegmentationModel, config: TrainingConfig) -> None:
    """Raises ValueError if the model does not take images of the crop, or scales make them too small or too large."""
    side = config.crop or model.config.image_size
    if config.scales is not None and not MIN_SIDE <= side * config.scales[0] <= side * config.scales[1] <= MAX_SIDE:
        wrong = f"got {list(config.scales)} times a crop of {side}"
        raise ValueError(f"scales must make images of {MIN_SIDE} to {MAX_SIDE} pixels a side, {wrong}.")
    if config.crop is None:
        return
    try:
        with torch.no_grad():
            model.encode_image(torch.zeros(1, 3, config.crop, config.crop, dtype=torch.uint8))
    except Exception as error:
        if lacks_memory(error) or isinstance(error, (ValueError, RuntimeError)):
            first = (str(error).splitlines() or ["not enough memory"])[0]
            raise ValueError(f"crop {config.crop} does not fit {config.model}: {first}") from error
        raise


def _check_clip(preset: str, pretrained: str) -> None:
    architecture = getattr(get_preset(preset).config, "clip", None)
    if architecture is None or Path(pretrained).is_file():
        return
    if not isinstance(architecture, str):
        if pretrained != TINY_CLIP:
            raise ValueError(f"clip_pretrained must be a file or {TINY_CLIP!r} for {preset}, got {pretrained!r}.")
        return
    ensure_importable()
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained.lower().replace("-", "_") not in {tag.lower().replace("-", "_") for tag in tags}:
        raise ValueError(
            f"clip_pretrained must be a file, or open_clip's name of weights for {architecture} ({', '.join(tags)}), "
            f"got {pretrained!r}."
        )
