"""What models are trained and evaluated on: class lists, datasets on disk, and what is wrong with them.

Augmentations are in `ovseg_fast.data.augmentation`, which needs torchvision and is imported on use.
"""

from __future__ import annotations

from .check import Problem, check_dataset, report
from .conventions import LAYOUTS
from .datasets import Pair, SegmentationDataset, open_dataset
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
from .world.scenes import World, WorldScenes

__all__ = [
    "ADE20K_150",
    "COCO_STUFF",
    "LAYOUTS",
    "NO_CLASS",
    "PASCAL_CONTEXT",
    "PASCAL_VOC",
    "PASCAL_VOC_20B",
    "VOCABULARIES",
    "WORLD",
    "DataError",
    "Pair",
    "Problem",
    "SegmentationDataset",
    "Vocabulary",
    "World",
    "WorldScenes",
    "check_dataset",
    "open_dataset",
    "report",
]
