"""Open-vocabulary semantic segmentation: CAT-Seg and Cascade-CLIP as one fast, installable package.

import ovseg_fast as ovs

seg = ovs.load("catseg-vitb")
out = seg.segment("cat.jpg", ["cat", "grass", "sky"])
out.labels, out.overlay(), out.save("cat_overlay.png")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported on first use, so that importing the package is quick and needs nothing that is not used.
_LAZY = {"Segmentation": "segmentation", "build": "models", "checkpoints": "checkpoints", "ops": "ops"}
_LAZY |= dict.fromkeys(("EncodedImage", "Segmenter", "load"), "segmenter")
_LAZY |= {"evaluate": "evaluation.evaluate", "train": "training.run"}
_LAZY |= dict.fromkeys(("backend", "explain", "last_backend"), "backends")
__all__ = [
    "EncodedImage",
    "Segmentation",
    "Segmenter",
    "__version__",
    "backend",
    "build",
    "checkpoints",
    "evaluate",
    "explain",
    "last_backend",
    "load",
    "ops",
    "train",
]

if TYPE_CHECKING:
    from . import checkpoints, ops
    from .backends import backend, explain, last_backend
    from .evaluation.evaluate import evaluate
    from .models import build
    from .segmentation import Segmentation
    from .segmenter import EncodedImage, Segmenter, load
    from .training.run import train


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_LAZY[name]}", __name__)
    return module if _LAZY[name] == name else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
