"""Training as published: which parameters move and how fast, and which labels they are shown."""

from __future__ import annotations

from .finetuning import POLICIES, published_policy, set_trainable
from .labels import pseudo_labels, seen_classes, seen_labels
from .optimizer import (
    PUBLISHED,
    Hyperparameters,
    build_optimizer,
    build_schedule,
    cosine,
    method,
    parameter_groups,
    poly,
)

__all__ = [
    "POLICIES",
    "PUBLISHED",
    "Hyperparameters",
    "build_optimizer",
    "build_schedule",
    "cosine",
    "method",
    "parameter_groups",
    "poly",
    "pseudo_labels",
    "published_policy",
    "seen_classes",
    "seen_labels",
    "set_trainable",
]
