"""The two methods as modules, and their presets."""

from .cascade_clip import CascadeCLIP, CascadeCLIPConfig
from .catseg import CATSeg, CATSegConfig
from .presets import PRESETS, Preset, build, get_preset

__all__ = [
    "PRESETS",
    "CATSeg",
    "CATSegConfig",
    "CascadeCLIP",
    "CascadeCLIPConfig",
    "Preset",
    "build",
    "get_preset",
]
