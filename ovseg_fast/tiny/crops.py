"""Crops of scenes around single things, and captions of single things."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.world.classes import CLASS_WORDS
from ..data.world.scenes import Scene, describe, phrase
from ..models import cascade_clip, catseg

# The prompts of segmentation.
TEMPLATES = (*catseg.TEMPLATES, *cascade_clip.VOC_TEMPLATES, *cascade_clip.TEMPLATES)
# For each class the five that differ from it at most in the last word, the shape or the material; itself first.
LAST_WORDS = tuple(
    tuple(sorted((i for i, other in enumerate(CLASS_WORDS) if other[:-1] == words[:-1]), key=lambda i: i != label))
    for label, words in enumerate(CLASS_WORDS)
)


def object_crops(scenes: list[Scene], most: int, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """At most `most` crops around single objects and pieces of ground, (B, 3, size, size) uint8, and their classes,
    (B,) int64, all different."""
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
    pictures = []
    for scene, box in (boxes[label] for label in labels[:most]):
        pictures.append(np.asarray(Image.fromarray(scene.image).resize((size, size), Image.Resampling.BICUBIC, box)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.tensor(labels[:most])


def class_captions(rng: np.random.Generator) -> list[str]:
    """A caption of each class alone, worded differently each time."""
    captions = []
    for label in range(len(CLASS_WORDS)):
        template = TEMPLATES[int(rng.integers(len(TEMPLATES)))]
        plain = rng.random() < 0.4
        captions.append(template.replace("{}", phrase(label, rng, article=False)) if plain else describe([label], rng))
    return captions


def shown_classes(scenes: list[Scene]) -> Tensor:
    """(S, T) bool: the classes that each scene shows."""
    shown = torch.zeros(len(scenes), len(CLASS_WORDS), dtype=torch.bool)
    for row, scene in zip(shown, scenes, strict=True):
        row[[scene.ground, *(region.label for region in scene.regions)]] = True
    return shown


def _square(twice_x: float, twice_y: float, side: float, scene: Scene) -> tuple[float, float, float, float]:
    """A square around a centre, moved to lie in the image."""
    height, width = scene.labels.shape
    left = min(max(twice_x / 2 - side / 2, 0), width - side)
    top = min(max(twice_y / 2 - side / 2, 0), height - side)
    return left, top, left + side, top + side
