"""The methods as modules, and their presets."""

from .base import AugmentationSettings, Hyperparameters, Rule, SegmentationModel
from .cascade_clip import CascadeCLIP, CascadeCLIPConfig
from .catseg import CATSeg, CATSegConfig
from .presets import PRESETS, Preset, build, get_preset, register

__all__ = [
    "PRESETS",
    "AugmentationSettings",
    "CATSeg",
    "CATSegConfig",
    "CascadeCLIP",
    "CascadeCLIPConfig",
    "Hyperparameters",
    "Preset",
    "Rule",
    "SegmentationModel",
    "build",
    "get_preset",
    "register",
]
