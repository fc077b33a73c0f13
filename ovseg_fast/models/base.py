"""What a method is: `SegmentationModel`, the base of every model, and the facts that the rest of the package asks for.

A new method is a subclass of it and a registered `Preset` (see `models.presets`). Nothing else has to know it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..data.vocabularies import VOCABULARIES
from .losses import check_label_maps, weighted_losses
from .sliding import Windows, resize, square_windows, to_pixels

WRAPPED = "_orig_mod", "module", "_fsdp_wrapped_module"  # what torch.compile, DDP and FSDP call the model in them


class Rule(NamedTuple):
    """A pattern of our parameter names and upstream's name for them; `checkpoints.upstream` explains the patterns."""

    ours: str
    upstream: str
    leading_ones: int = 0


def rules(ours: str, upstream: str, *pairs: tuple[str, str] | tuple[str, str, int]) -> list[Rule]:
    """Rules whose names start with the prefixes `ours` and `upstream`."""
    return [Rule(ours + name, upstream + other, *rest) for name, other, *rest in pairs]


@dataclass(frozen=True)
class Hyperparameters:
    """Optimiser and schedule of a method.

    Attributes:
        learning_rate: peak rate of parameters with factor 1. weight_decay: of all but the kinds in `no_decay`.
        factors: prefix of parameter names -> factor of the learning rate. The first match counts; 1 without a match.
        no_decay: kinds of parameters without weight decay: "norm", "embedding".
        schedule: "cosine", or "poly" with its `power`. end: the rate at which "poly" ends, whatever the factor.
        warmup: steps of linear warm-up. warmup_ratio: the share of the decayed rate at which it starts.
        max_gradient_norm: the norm of all gradients together is clipped to this, or None.
        steps, batch: length of the published training; images per step over all processes.
        clip: the prefix in `factors` that stands for CLIP's weights ("" matches every name), or None without CLIP.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    factors: Mapping[str, float] = field(default_factory=dict)
    no_decay: tuple[str, ...] = ("norm",)
    schedule: str = "cosine"
    power: float = 0.9
    end: float = 0.0
    warmup: int = 0
    warmup_ratio: float = 0.0
    max_gradient_norm: float | None = None
    steps: int = 80_000
    batch: int = 4
    clip: str | None = None


@dataclass(frozen=True)
class AugmentationSettings:
    """Arguments of `data.augmentation.augmentation`, which describes them."""

    scales: tuple[float, float] = (1.0, 1.0)
    longest: float = float("inf")
    largest_share: float = 1.0
    fill: int = 0
    flip_first: bool = False


class SegmentationModel(nn.Module, ABC):
    """Images and text embeddings in, logits of the classes out.

    A subclass has the same constructor. It calls `super().__init__(config)`, sets `text_encoder`, implements
    `encode_pixels` and `decode`, and overrides the facts and methods that differ.

    Args:
        config: a frozen dataclass. The package reads its `image_size`: side of a training crop in pixels.
        clip_pretrained: weights of CLIP by open_clip's tag or a file; None for random ones.
    """

    # What it is and how it is prompted.
    method: ClassVar[str]  # its name, such as "cat-seg"
    statistics: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]]  # mean and standard deviation of RGB in 0..255
    modes: ClassVar[tuple[str, ...]] = ("slide", "whole")  # of `windows`
    templates: tuple[str, ...] = ("a photo of a {}.",)  # prompts, each with one {}
    prompts_per_class: int | None = None  # how many it takes; None: any number
    training_classes: str | None = None  # name of the vocabulary that it was trained on
    seen_offset: float | None = None  # subtracted from the probabilities of seen classes; None: nothing is

    # Checkpoints.
    hub_space: ClassVar[str | None] = None  # of the Hugging Face hub, where its authors publish weights
    hub_note: ClassVar[str] = ""  # where else the weights are, for an error message
    upstream_rules: ClassVar[tuple[Rule, ...]] = ()  # none: no upstream format
    upstream_derived: ClassVar[tuple[str, ...]] = ()  # patterns of upstream buffers that follow from the configuration
    mark: ClassVar[str | None] = None  # our name of a tensor that only checkpoints of this method have

    # Training.
    clip_prefixes: ClassVar[tuple[str, ...]] = ()  # of the names of the encoders' parameters; others always train
    policy: ClassVar[str] = "full"  # published fine-tuning policy
    policies: ClassVar[Mapping[str, str]] = {}  # name -> regex of the encoders' parameters to train; see `finetuning`
    hyperparameters: ClassVar[Hyperparameters] = Hyperparameters()
    augmentation: ClassVar[AugmentationSettings] = AugmentationSettings()
    seen_only: ClassVar[bool] = False  # published training leaves out the unseen classes of a zero-shot split
    loss_weights: ClassVar[Mapping[str, float]] = {"bce": 1.0}  # of the terms of `ops.mask_losses`

    preset: str | None = None  # the name of the preset that it was built from
    text_encoder: nn.Module  # (..., 77) token ids -> (..., E)
    pixel_mean: Tensor  # (3, 1, 1)
    pixel_std: Tensor

    def __init__(self, config: Any, clip_pretrained: str | Path | None = None) -> None:
        super().__init__()
        self.config = config
        self.set_statistics(torch.get_default_dtype())

    def set_statistics(self, dtype: torch.dtype) -> None:
        """Set `pixel_mean` and `pixel_std` anew, in that dtype."""
        for name, values in zip(("pixel_mean", "pixel_std"), self.statistics, strict=True):
            self.register_buffer(name, torch.tensor(values, dtype=dtype).view(3, 1, 1), persistent=False)

    @property
    def trained_on(self) -> tuple[str, ...]:
        """Names of the seen classes of `training_classes`."""
        return VOCABULARIES[self.training_classes].seen if self.training_classes else ()

    def normalise(self, pixels: Tensor) -> Tensor:
        """(B, 3, h, w) in 0..255, less the mean, over the standard deviation."""
        return (pixels - self.pixel_mean) / self.pixel_std

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(T, P, 77) int64 token ids -> (T, P, E) unit-length text embeddings.

        Raises:
            TypeError, ValueError: `tokens` is not integer or has another rank.
        """
        if tokens.dim() != 3:
            raise ValueError(f"tokens must have shape (T, P, 77), got {tuple(tokens.shape)}.")
        return F.normalize(self.text_encoder(tokens), dim=-1)

    def text_from_prompts(self, embeddings: Tensor) -> Tensor:
        """The `text` argument of `decode` from prompt embeddings (T, P, E); by default unchanged."""
        return embeddings

    @abstractmethod
    def encode_pixels(self, pixels: Tensor) -> Any:
        """(B, 3, h, w) in 0..255 -> features for `decode`."""

    @abstractmethod
    def decode(self, features: Any, text: Tensor) -> Tensor:
        """Features of B images and text embeddings of T classes -> logits (B, T, h', w')."""

    def encode_image(self, images: Tensor) -> Any:
        """(B, 3, h, w) uint8, or float in 0..1 -> features for `decode`, in the model's dtype."""
        return self.encode_pixels(to_pixels(images, self.pixel_mean.dtype))

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """Logits of every class.

        Args:
            images: (B, 3, h, w) uint8, or float in 0..1, RGB.
            text: unit-length embeddings of T classes, as `decode` takes them.

        Returns:
            (B, T, h', w').

        Raises:
            TypeError, ValueError: images or text have another dtype or shape.
        """
        refuse_tracing()
        return self.decode(self.encode_image(images), text)

    def loss(self, images: Tensor, labels: Tensor, text: Tensor) -> dict[str, Tensor]:
        """The published training loss: the terms in `loss_weights`, see `ops.mask_losses`.

        As published, pixels of no class count as negatives of every class. Logits are resized to the labels map by map;
        neither they nor one-hot targets are held at that size. With `torch.distributed`, all processes must call this
        together.

        Args:
            images, text: as in `forward`, text of the classes trained on.
            labels: (B, H, W) uint8, int32 or int64 class indices; −1, or any other outside 0..T-1, means no class.

        Returns:
            Scalars: the weighted terms by name, and their sum "loss".

        Raises:
            TypeError, ValueError: images, labels or text have another dtype or shape.
        """
        check_label_maps(labels, images)
        return weighted_losses(self.decode(self.encode_image(images), text), labels, self.loss_weights)

    def windows(self, image: Tensor, mode: str) -> Windows:
        """Cut one image (3, H, W) in 0..255 into model inputs.

        "slide": shorter side resized to `image_size`, windows of that side at `stride`. "whole": resized to a square,
        without keeping the aspect ratio, as one window.

        Raises:
            ValueError: for "slide", one side of the image is more than 32 times the other.
        """
        return square_windows(image, self.config.image_size, self.stride, whole=mode == "whole")

    @property
    def stride(self) -> int:
        """Of sliding windows, in pixels."""
        return int(self.config.image_size)

    def scores(self, score_map: Tensor) -> Tensor:
        """Scores (T, H, W) in 0..1 from `ops.score_map`; by default unchanged."""
        return score_map

    def dense_embeddings(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image embeddings in the space of the text, (1, h, w, E), of one image (3, H, W) in 0..255; and the size in
        pixels that they cover, with any padding at the right and below."""
        raise NotImplementedError(f"{type(self).__name__} has no dense embeddings, so there are no cosines to show.")

    def cost_maps(self, image: Tensor, text: Tensor) -> Tensor:
        """Cosines (T, H, W) of the dense embeddings of one image (3, H, W) in 0..255 with `text` as `decode` takes it,
        (T, P, E) or (T, E); the mean over a class's prompts."""
        dense, covered = self.dense_embeddings(image)
        volume = ops.cost_volume(dense, text if text.dim() == 3 else text.unsqueeze(1))
        return resize(volume.mean(-1), *covered)[0, :, : image.shape[1], : image.shape[2]]

    def upstream_buffers(self) -> dict[str, Tensor]:
        """Buffers that upstream saves although they follow from the configuration."""
        return {}


def refuse_tracing() -> None:
    """Raises RuntimeError in `torch.jit.trace`, which would fix the shapes of its example."""
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace cannot trace this model; use torch.export or torch.onnx.export(dynamo=True)."
        )


def check_model(model: object) -> None:
    """Raises TypeError for anything but a `SegmentationModel`."""
    if not isinstance(model, SegmentationModel):
        raise TypeError(f"model must be a SegmentationModel, got {type(model).__name__}.")


def unwrap(model: object) -> SegmentationModel:
    """The model itself, out of `torch.compile`, `DistributedDataParallel`, `AveragedModel` and the like.

    Raises:
        TypeError: there is no `SegmentationModel` in it. ValueError: its weights are elsewhere, as with FSDP.
    """
    inner: Any = model
    while isinstance(inner, nn.Module) and not isinstance(inner, SegmentationModel):
        children = inner._modules
        inner = next((children[name] for name in WRAPPED if children.get(name) is not None), None)
    check_model(inner if inner is not None else model)
    if type(model).__name__ == "FullyShardedDataParallel" or any(
        _is_elsewhere(weight) for weight in inner.parameters()
    ):
        raise ValueError("model must hold its weights itself, got one whose weights are sharded or on 'meta'.")
    return inner


def is_compiled(model: object) -> bool:
    """Whether `torch.compile` wraps the model, at any depth."""
    while isinstance(model, nn.Module) and not isinstance(model, SegmentationModel):
        if "_orig_mod" in model._modules:
            return True
        model = next((model._modules[name] for name in WRAPPED if name in model._modules), None)
    return False


def _is_elsewhere(weight: Tensor) -> bool:
    return weight.is_meta or hasattr(weight, "full_tensor")
