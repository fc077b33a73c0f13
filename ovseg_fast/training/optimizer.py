"""Optimiser and schedule of a method, from its `Hyperparameters`; by default the published ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..arguments import check_number, check_whole
from ..models import Hyperparameters, SegmentationModel
from ..models.base import check_model

Schedule = Callable[[int], float]


def with_clip_rate(settings: Hyperparameters, rate: float) -> Hyperparameters:
    """The same with another learning rate for CLIP's weights. Raises ValueError if the method has no CLIP."""
    if settings.clip is None:
        raise ValueError(f"clip_learning_rate is for methods with a CLIP of their own, got {rate}.")
    check_number("clip_learning_rate", rate, 0)
    return replace(settings, factors={**settings.factors, settings.clip: rate / settings.learning_rate})


def parameter_groups(model: SegmentationModel, settings: Hyperparameters | None = None) -> list[dict[str, Any]]:
    """The parameters that require gradients as groups for AdamW, by learning rate and weight decay; `settings` are the
    published ones by default. Raises TypeError for another model, ValueError if no parameter requires gradients."""
    check_model(model)
    settings = settings or model.hyperparameters
    for name in ("learning_rate", "weight_decay"):
        check_number(name, getattr(settings, name), 0)
    undecayed = set(_undecayed(model, settings.no_decay))
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = next((factor for start, factor in settings.factors.items() if name.startswith(start)), 1.0)
        rate, decay = settings.learning_rate * factor, 0.0 if name in undecayed else settings.weight_decay
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    if not groups:
        raise ValueError("model must have a parameter that requires gradients; call set_trainable first.")
    return list(groups.values())


def build_optimizer(model: SegmentationModel, settings: Hyperparameters | None = None) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; same arguments and errors."""
    return torch.optim.AdamW(parameter_groups(model, settings))


def build_schedule(
    optimizer: torch.optim.Optimizer, settings: Hyperparameters, steps: int | None = None
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rates of all groups over `steps` optimiser steps, by default the published number. Raises
    ValueError as `cosine` and `poly`, or if the settings name another schedule."""
    steps = settings.steps if steps is None else steps
    if settings.schedule not in ("cosine", "poly"):
        raise ValueError(f"schedule must be cosine or poly, got {settings.schedule!r}.")
    rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    schedules = [cosine(steps) if settings.schedule == "cosine" else poly(steps, rate, settings) for rate in rates]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)


def cosine(steps: int) -> Schedule:
    """Step -> factor of the learning rate: half a cosine from 1 at step 0 to 0 at `steps`, then 0. Raises ValueError if
    `steps` is less than 1."""
    _check_steps(steps)
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))


def poly(steps: int, rate: float, settings: Hyperparameters) -> Schedule:
    """Step -> factor of a group's learning rate `rate`: polynomial decay after a linear warm-up.

        decayed(step) = end + (rate − end) · (1 − step / steps)^power
        lr(step) = decayed(step) · (ratio + (1 − ratio) · step / warmup)      for the first `warmup` steps

    Raises ValueError if `steps` is less than 1, `rate` is not positive, or `warmup` is negative.
    """
    _check_steps(steps)
    if check_number("rate", rate) <= 0:
        raise ValueError(f"rate must be positive, got {rate}.")
    if settings.warmup < 0:
        raise ValueError(f"warmup must be a number of steps, 0 or more, got {settings.warmup}.")
    end, ratio = settings.end, settings.warmup_ratio

    def factor(step: int) -> float:
        lr = end + (rate - end) * (1 - min(step, steps) / steps) ** settings.power
        if step < settings.warmup:
            lr *= ratio + (1 - ratio) * step / settings.warmup
        return lr / rate

    return factor


def _undecayed(model: nn.Module, kinds: Iterable[str]) -> Iterable[str]:
    """Names of the parameters of some kinds; CAT-Seg's `cost_embedding` is a convolution, not an embedding."""
    for prefix, module in model.named_modules():
        for leaf, _ in module.named_parameters(prefix, recurse=False):
            own = leaf.rpartition(".")[2]
            norm = isinstance(module, (nn.LayerNorm, nn.GroupNorm)) or own in ("norm_weight", "norm_bias")
            embedding = isinstance(module, nn.Embedding) or own.endswith(("_embedding", "_embeddings"))
            if ("norm" in kinds and norm) or ("embedding" in kinds and embedding):
                yield leaf


def _check_steps(steps: int) -> None:
    check_whole("steps", steps)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
