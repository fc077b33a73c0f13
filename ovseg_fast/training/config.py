"""The configuration of a training run, as a TOML file; docs/training.md has an example."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from ..arguments import check_number
from ..files import read_text
from ..images import MAX_SIDE
from ..models.presets import get_preset

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # by accelerate's names
FREE_ON_RESUME = frozenset(
    {"out", "steps", "workers", "log_every", "checkpoint_every", "evaluate_every", "validation", "pictures"}
)

LARGEST = 2**63 - 1  # that TOML, torch and TensorBoard take
LOWEST = {  # of whole numbers
    **dict.fromkeys(("steps", "batch", "accumulation", "log_every", "checkpoint_every", "evaluate_every"), 1),
    **dict.fromkeys(("warmup", "seed", "workers", "pictures"), 0),
    "crop": 2,
}
HIGHEST = {"crop": MAX_SIDE, "workers": 1024, "batch": 65_536, "pictures": 1000}
RATES = 1e-12, 1.0  # of learning: AdamW moves a weight by about the rate, so beyond lie no movement and no training
NORMS = 1e-12, 1e12

Config = TypeVar("Config")


@dataclass(frozen=True)
class DataConfig:
    """What `data.open_dataset` takes. In files `layout` is an older spelling of `dataset`."""

    dataset: str
    root: str = "."
    split: str = ""
    limit: int | None = None


@dataclass(frozen=True)
class TrainingConfig:
    """One training run. The first four are required; None stands for the published value, if any.

    Attributes:
        model: a preset's name. out: the folder for checkpoints, logs and pictures. steps: optimiser steps.
        data: the training data. validation: the evaluation data, if any.
        weights: a checkpoint to start from; or clip_pretrained: weights of CLIP alone, see `models.build`.
        policy: the part of CLIP to train, see `finetuning.set_trainable`.
        seen_only: train only on the seen classes of a zero-shot split (published for Cascade-CLIP).
        transductive: from this share of the steps on, unseen pixels get pseudo-labels; None: never.
        batch: images per step, over all processes and `accumulation` parts, each with its own forward pass.
        crop: side of a training crop in pixels; by default the model's.
        scales: smallest and largest shorter side before the crop, in units of `crop`. distortion: of colours.
        sample_classes: besides the classes in its images, each step takes only a random number of the others, so that
            the model learns lists of any length; published training takes all.
        learning_rate: of the optimiser; its groups keep their ratios. warmup: steps of linear warm-up.
        clip_learning_rate: of CLIP's weights; as published 1/100 of the rest for CAT-Seg, 1/10 for Cascade-CLIP.
        max_gradient_norm: the norm of all gradients is clipped to this (0.01 for CAT-Seg, none for Cascade-CLIP); inf:
            not clipped. Short trainings of Cascade-CLIP need it: its first gradients are so large that AdamW, which
            remembers squares for a thousand steps, hardly moves afterwards.
        precision: of autocast, `"fp32"`, `"bf16"` or `"fp16"`.
        seed: of random initial weights, order, augmentation and dropout.
        workers: processes that read images, per training process.
        log_every, checkpoint_every, evaluate_every: in steps; pictures: validation images drawn at each evaluation.
    """

    model: str
    out: str
    steps: int
    data: DataConfig
    validation: DataConfig | None = None
    weights: str | None = None
    clip_pretrained: str | None = None
    policy: str | None = None
    seen_only: bool | None = None
    transductive: float | None = None
    batch: int = 4
    accumulation: int = 1
    crop: int | None = None
    scales: tuple[float, float] | None = None
    distortion: bool = True
    sample_classes: bool = False
    learning_rate: float | None = None
    clip_learning_rate: float | None = None
    warmup: int | None = None
    max_gradient_norm: float | None = None
    precision: str = "fp32"
    seed: int = 0
    workers: int = 2
    log_every: int = 20
    checkpoint_every: int = 1000
    evaluate_every: int = 5000
    pictures: int = 4

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            _check_type(kind, getattr(self, name), name)
        get_preset(self.model)
        if not self.out:
            raise ValueError("out must name a folder, got ''.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}.")
        for name, lowest in LOWEST.items():
            _check_range(name, getattr(self, name), lowest, HIGHEST.get(name, LARGEST))
        for table in ("data", "validation"):
            if getattr(self, table) is not None:
                _check_range(f"{table}.limit", getattr(self, table).limit, 1, LARGEST)
        if self.batch % self.accumulation:
            raise ValueError(f"batch must be a multiple of accumulation, {self.accumulation}, got {self.batch}.")
        if self.scales is not None and not 0 < self.scales[0] <= self.scales[1] < math.inf:
            raise ValueError(f"scales must be two numbers above 0, the smaller one first, got {list(self.scales)}.")
        for name in ("learning_rate", "clip_learning_rate"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), *RATES, "a rate")
        if self.max_gradient_norm is not None and self.max_gradient_norm != math.inf:
            check_number("max_gradient_norm", self.max_gradient_norm, *NORMS, "inf or a number")
        if self.transductive is not None:
            check_number("transductive", self.transductive, 0, 1, "a share of the steps")
        if self.weights is not None and self.clip_pretrained is not None:
            raise ValueError("weights and clip_pretrained exclude each other: weights hold those of CLIP.")


def as_config(config: TrainingConfig | Mapping[str, Any] | str | os.PathLike[str]) -> TrainingConfig:
    """A configuration, given as such, as the keys and values of a file, or as the path of one.

    Raises:
        TypeError: it is something else. Otherwise as `read_toml`.
    """
    if isinstance(config, TrainingConfig):
        return config
    if isinstance(config, Mapping):
        return cast(TrainingConfig, _build(TrainingConfig, config, ""))
    if isinstance(config, (str, os.PathLike)):
        return read_config(config)
    raise TypeError(f"config must be a TrainingConfig, a dict or the path of a file, got {type(config).__name__}.")


def read_config(path: str | os.PathLike[str]) -> TrainingConfig:
    """The configuration in a TOML file, with paths relative to the working folder. Errors as `read_toml`."""
    return read_toml(path, TrainingConfig)


def read_toml(path: str | os.PathLike[str], kind: type[Config]) -> Config:
    """A dataclass from a TOML file whose keys are its fields.

    Raises:
        FileNotFoundError: no such file. ValueError, TypeError: not TOML, or a key that is unknown, missing, of another
            type or out of range; the sentence names the file and the key.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no configuration file '{file}'.")
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    text = read_text(file, "TOML file")
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"'{file}' is not a TOML file that can be read: it is nested too deeply.") from None
    except ValueError as error:  # tomllib's own, or that of a number with thousands of digits
        raise ValueError(f"'{file}' is not a TOML file: {error}.") from None
    try:
        return cast(Config, _build(kind, values, ""))
    except (ValueError, TypeError) as error:
        raise type(error)(f"in '{file}': {error}") from None


def check_resumable(saved: Mapping[str, Any], config: TrainingConfig) -> None:
    """Raises ValueError that names the keys in which a run with `config` differs from the saved one."""
    now = dataclasses.asdict(config)
    saved = {name: _respell(value, "") if name == "data" else value for name, value in saved.items()}
    changed = [name for name in now if name not in FREE_ON_RESUME and saved.get(name) != now[name]]
    if changed:
        parts = ", ".join(f"{name} {saved.get(name)!r} is now {now[name]!r}" for name in changed)
        cure = "change it back, choose another out, or start over with --restart."
        raise ValueError(f"out holds a run with another configuration ({parts}); {cure}")


def _respell(values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A dataset's settings with `dataset` for `layout`, its older spelling."""
    if "layout" not in values:
        return values
    if "dataset" in values:
        raise ValueError(f"{where}layout is an older spelling of {where}dataset; give only {where}dataset.")
    return {"dataset" if name == "layout" else name: value for name, value in values.items()}


def _build(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    types = get_type_hints(kind)
    values = _respell(values, where) if kind is DataConfig else values
    unknown = sorted(map(str, values.keys() - types.keys()))
    if unknown:
        raise ValueError(f"unknown key {where}{unknown[0]}; there are {', '.join(where + name for name in types)}.")
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.name not in values:
            raise ValueError(f"{where}{field.name} is missing.")
    return kind(**{name: _value(types[name], value, where + name) for name, value in values.items()})


def _value(kind: Any, value: Any, name: str) -> Any:
    """A value of a file as the type of its field."""
    kinds = _kinds(kind)
    if dataclasses.is_dataclass(kinds[0]) and isinstance(value, Mapping):
        return _build(kinds[0], value, f"{name}.")
    if get_origin(kinds[0]) is tuple and isinstance(value, list):
        value = tuple(_float(each, name) if type(each) is int else each for each in value)
    elif float in kinds and type(value) is int:
        value = _float(value, name)
    elif isinstance(value, os.PathLike):
        value = os.fspath(value)
    _check_type(kind, value, name)
    return value


def _float(value: int, name: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that fits 64 bits, got one of {len(str(value))} digits.") from None


def _kinds(kind: Any) -> list[Any]:
    """The types of a field but None."""
    return [each for each in (get_args(kind) if isinstance(kind, UnionType) else (kind,)) if each is not NoneType]


def _check_type(kind: Any, value: Any, name: str) -> None:
    kinds = _kinds(kind)
    if value is None and isinstance(kind, UnionType):
        return
    if dataclasses.is_dataclass(kinds[0]):
        if not isinstance(value, cast(type, kinds[0])):
            raise TypeError(f"{name} must be a table [{name}], got {value!r}.")
        for part, own in get_type_hints(kinds[0]).items():
            _check_type(own, getattr(value, part), f"{name}.{part}")
    elif get_origin(kinds[0]) is tuple:
        parts = get_args(kinds[0])
        if not isinstance(value, (tuple, list)) or len(value) != len(parts):
            raise TypeError(f"{name} must be a list of {len(parts)} numbers, got {value!r}.")
        for place, own in enumerate(parts):
            _check_type(own, value[place], f"{name}[{place}]")
    elif type(value) not in kinds and not (float in kinds and type(value) is int):
        words = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
        raise TypeError(f"{name} must be {' or '.join(words[each] for each in kinds)}, got {value!r}.")
    elif isinstance(value, str) and "\0" in value:
        raise ValueError(f"{name} must hold no null character, got {value!r}.")


def _check_range(name: str, value: int | None, lowest: int, highest: int) -> None:
    if value is None or lowest <= value <= highest:
        return
    bound = f"at least {lowest}" if value < lowest else f"at most {highest}"
    raise ValueError(f"{name} must be {bound}, got {value}.")
