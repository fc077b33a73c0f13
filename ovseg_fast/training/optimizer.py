"""Optimiser and schedule of both methods, as published.

|  | CAT-Seg (arXiv 2303.11797, section 4.1) | Cascade-CLIP (arXiv 2406.00670, section 4.1) |
|---|---|---|
| AdamW, learning rate | 2e-4; CLIP × 0.01 | 2e-5; visual prompts and head × 10 |
| weight decay | 1e-4; norms and embeddings 0 | 0.01; norms 0 |
| gradients | clipped to norm 0.01, all together | as they are |
| schedule | cosine to 0 | linear warm-up over 1500 steps from 1e-6, polynomial 0.9 to 1e-6 |
| steps, batch | 80 000, 4 | 20 000 (VOC), 40 000 (Context), 80 000 (COCO-Stuff), 16 |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..models import CascadeCLIP, CATSeg

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Hyperparameters:
    """What a method's optimiser and schedule are made of.

    Attributes:
        learning_rate: the highest one, of groups whose factor is 1.
        weight_decay: of all parameters but norms and, for CAT-Seg, embeddings, which have none.
        factors: of the learning rate, by beginnings of parameter names; the first that fits counts, 1 where none does.
        no_decay: kinds of parameters without weight decay, of "norm" and "embedding".
        schedule: "cosine", or "poly" with its `power`. end: learning rate that "poly" ends with, whatever the factor.
        warmup: steps of linear warm-up. warmup_start: learning rate that it starts from, whatever the factor.
        max_gradient_norm: norm to which the gradients of the whole model are clipped together, or None.
        steps, batch: length of the published training, and images of a step over all processes.
    """

    learning_rate: float
    weight_decay: float
    factors: tuple[tuple[str, float], ...]
    no_decay: tuple[str, ...]
    schedule: str
    power: float = 0.9
    end: float = 0.0
    warmup: int = 0
    warmup_start: float = 0.0
    max_gradient_norm: float | None = None
    steps: int = 80_000
    batch: int = 4


PUBLISHED = {
    "cat-seg": Hyperparameters(
        learning_rate=2e-4,
        weight_decay=1e-4,
        factors=(("clip.", 0.01),),
        no_decay=("norm", "embedding"),
        schedule="cosine",
        max_gradient_norm=0.01,
    ),
    "cascade-clip": Hyperparameters(
        learning_rate=2e-5,
        weight_decay=0.01,
        factors=(("image_encoder.prompt", 10.0), ("image_encoder.deep_prompt", 10.0), ("head.", 10.0)),
        no_decay=("norm",),
        schedule="poly",
        end=1e-6,
        warmup=1500,
        warmup_start=1e-6,  # read as a learning rate, as the end of the decay is
        batch=16,
    ),
}


def with_clip_rate(settings: Hyperparameters, rate: float) -> Hyperparameters:
    """The same with another learning rate for CLIP's own weights; that of all others stays."""
    factors = dict(settings.factors)
    if "clip." in factors:  # CAT-Seg, where the rest has the factor 1
        return replace(settings, factors=tuple((factors | {"clip.": rate / settings.learning_rate}).items()))
    scale = settings.learning_rate / rate  # Cascade-CLIP, where CLIP has
    return replace(
        settings, learning_rate=rate, factors=tuple((name, factor * scale) for name, factor in factors.items())
    )


def method(model: CATSeg | CascadeCLIP) -> str:
    """The key of `PUBLISHED` that fits a model, `"cat-seg"` or `"cascade-clip"`.

    Raises:
        TypeError: `model` is something else.
    """
    if isinstance(model, CATSeg):
        return "cat-seg"
    if isinstance(model, CascadeCLIP):
        return "cascade-clip"
    raise TypeError(f"model must be a CATSeg or a CascadeCLIP, got {type(model).__name__}.")


def parameter_groups(model: CATSeg | CascadeCLIP, settings: Hyperparameters | None = None) -> list[dict[str, Any]]:
    """The trainable parameters by learning rate and weight decay, as `torch.optim.AdamW` takes them.

    Args:
        model: its parameters that require gradients are taken, see `finetuning.set_trainable`.
        settings: by default the published ones of the model's method.

    Returns:
        Groups with `params`, `lr` and `weight_decay`, in the order in which the model first needs them.

    Raises:
        TypeError: `model` is something else. ValueError: no parameter requires gradients.
    """
    settings = settings or PUBLISHED[method(model)]
    undecayed = set(_undecayed(model, settings.no_decay))
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = next((factor for start, factor in settings.factors if name.startswith(start)), 1.0)
        rate, decay = settings.learning_rate * factor, 0.0 if name in undecayed else settings.weight_decay
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    if not groups:
        raise ValueError("model must have a parameter that requires gradients; call set_trainable first.")
    return list(groups.values())


def build_optimizer(model: CATSeg | CascadeCLIP, settings: Hyperparameters | None = None) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; same arguments and errors."""
    return torch.optim.AdamW(parameter_groups(model, settings))


def build_schedule(
    optimizer: torch.optim.Optimizer, settings: Hyperparameters, steps: int | None = None
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rates of all groups over `steps` optimiser steps, by default the published number.

    Raises:
        ValueError: as `cosine` and `poly`, or the settings name another schedule.
    """
    steps = settings.steps if steps is None else steps
    schedules: list[Schedule]
    if settings.schedule == "cosine":
        schedules = [cosine(steps)] * len(optimizer.param_groups)
    elif settings.schedule == "poly":
        rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        schedules = [
            poly(
                steps,
                rate,
                power=settings.power,
                end=settings.end,
                warmup=settings.warmup,
                warmup_start=settings.warmup_start,
            )
            for rate in rates
        ]
    else:
        raise ValueError(f"schedule must be cosine or poly, got {settings.schedule!r}.")
    return torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)


def cosine(steps: int) -> Schedule:
    """Step -> factor of the learning rate: half a cosine from 1 at step 0 to 0 at `steps`, and 0 from there on.

    Raises:
        ValueError: `steps` is less than 1.
    """
    _check_steps(steps)
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))


def poly(
    steps: int, rate: float, *, power: float = 0.9, end: float = 0.0, warmup: int = 0, warmup_start: float = 0.0
) -> Schedule:
    """Step -> factor of a group's learning rate `rate`: polynomial decay, with a linear warm-up towards it.

        decayed(step) = end + (rate − end) · (1 − step / steps)^power
        lr(step) = warmup_start + (decayed(step) − warmup_start) · step / warmup      for the first `warmup` steps

    Args:
        steps: where `end` is reached and kept. rate, end, warmup_start: learning rates.

    Raises:
        ValueError: `steps` is less than 1, `rate` is not positive, or `warmup` is negative.
    """
    _check_steps(steps)
    if rate <= 0:
        raise ValueError(f"rate must be positive, got {rate}.")
    if warmup < 0:
        raise ValueError(f"warmup must be a number of steps, 0 or more, got {warmup}.")

    def factor(step: int) -> float:
        lr = end + (rate - end) * (1 - min(step, steps) / steps) ** power
        if step < warmup:
            lr = warmup_start + (lr - warmup_start) * step / warmup
        return lr / rate

    return factor


def _undecayed(model: nn.Module, kinds: Iterable[str]) -> Iterable[str]:
    """Names of the parameters of some kinds; CAT-Seg's `cost_embedding` is a convolution and no embedding."""
    for prefix, module in model.named_modules():
        for leaf, _ in module.named_parameters(prefix, recurse=False):
            own = leaf.rpartition(".")[2]
            norm = isinstance(module, (nn.LayerNorm, nn.GroupNorm)) or own in ("norm_weight", "norm_bias")
            embedding = isinstance(module, nn.Embedding) or own.endswith(("_embedding", "_embeddings"))
            if ("norm" in kinds and norm) or ("embedding" in kinds and embedding):
                yield leaf


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
