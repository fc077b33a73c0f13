"""Datasets: class lists, images with masks on disk, and the procedural world, whose drawing code is imported on use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .check import ClassPixels, Findings, Problem, check_dataset, class_pixels, examine, report
from .conventions import DATASETS
from .datasets import Dataset, Pair, SegmentationDataset, open_dataset
from .masks import NO_CLASS, DataError
from .vocabularies import (
    ADE20K_150,
    COCO_STUFF,
    PASCAL_CONTEXT,
    PASCAL_VOC,
    PASCAL_VOC_20B,
    VOCABULARIES,
    WORLD,
    Vocabulary,
)

if TYPE_CHECKING:
    from .world.scenes import World, WorldScenes

__all__ = [
    "ADE20K_150",
    "COCO_STUFF",
    "DATASETS",
    "NO_CLASS",
    "PASCAL_CONTEXT",
    "PASCAL_VOC",
    "PASCAL_VOC_20B",
    "VOCABULARIES",
    "WORLD",
    "ClassPixels",
    "DataError",
    "Dataset",
    "Findings",
    "Pair",
    "Problem",
    "SegmentationDataset",
    "Vocabulary",
    "World",
    "WorldScenes",
    "check_dataset",
    "class_pixels",
    "examine",
    "open_dataset",
    "report",
]


def __getattr__(name: str) -> Any:
    if name in ("World", "WorldScenes"):
        return getattr(import_module(".world.scenes", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
