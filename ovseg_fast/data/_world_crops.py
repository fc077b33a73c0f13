"""Crops of scenes around single things, with captions of those alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..vocabulary import CASCADE_TEMPLATES, CASCADE_VOC_TEMPLATES, CATSEG_TEMPLATES
from .world import Scene, describe, phrase

TEMPLATES = (*CATSEG_TEMPLATES, *CASCADE_VOC_TEMPLATES, *CASCADE_TEMPLATES)  # what segmentation will ask with


class Crops(NamedTuple):
    """B pictures (B, 3, size, size) uint8 with their captions, and (S, B) bool: which of the S scenes that they
    were cut from show what a caption names."""

    pictures: Tensor
    captions: list[str]
    shown: Tensor


def object_crops(scenes: list[Scene], most: int, size: int, rng: np.random.Generator) -> Crops:
    """At most `most` crops around single objects and pieces of ground, no two of the same class."""
    boxes: dict[int, tuple[Scene, tuple[float, float, float, float]]] = {}
    for scene in scenes:
        for region in scene.regions:
            left, top, right, bottom = region.box
            side = min(max(right - left, bottom - top) * rng.uniform(0.9, 1.5), min(scene.labels.shape))
            boxes.setdefault(region.label, (scene, _square(left + right, top + bottom, side, scene)))
        for _ in range(4):
            side = rng.uniform(20, 48)
            x, y = rng.uniform(0, 2 * scene.labels.shape[0], 2)
            box = _square(x, y, side, scene)
            left, top, right, bottom = (round(edge) for edge in box)
            if (scene.labels[top:bottom, left:right] == scene.ground).mean() > 0.85:
                boxes.setdefault(scene.ground, (scene, box))
                break
    labels = list(boxes)
    rng.shuffle(labels)
    pictures, captions = [], []
    for label in labels[:most]:
        scene, box = boxes[label]
        crop = Image.fromarray(scene.image).resize((size, size), Image.Resampling.BICUBIC, box=box)
        pictures.append(np.asarray(crop))
        captions.append(_crop_caption(label, scene, rng))
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    things = [{scene.ground, *(region.label for region in scene.regions)} for scene in scenes]
    shown = torch.tensor([[label in named for label in labels[:most]] for named in things])
    return Crops(stacked, captions, shown)


def _crop_caption(label: int, scene: Scene, rng: np.random.Generator) -> str:
    chance = rng.random()
    if chance < 0.4:
        return TEMPLATES[int(rng.integers(len(TEMPLATES)))].replace("{}", phrase(label, rng, article=False))
    return describe([label], rng)


def _square(twice_x: float, twice_y: float, side: float, scene: Scene) -> tuple[float, float, float, float]:
    """A square around a middle, moved to lie in the picture."""
    height, width = scene.labels.shape
    left = min(max(twice_x / 2 - side / 2, 0), width - side)
    top = min(max(twice_y / 2 - side / 2, 0), height - side)
    return left, top, left + side, top + side
