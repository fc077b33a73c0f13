"""Endless scenes of patterned shapes on grounds, with masks and captions, all from a seed.

Three words describe an object, colour × pattern × shape ("red striped circle"), and two a ground, colour × material
("grey brick wall"): 120 + 20 classes by combination. A quarter of the combinations is *unseen*, whatever the seed:
training scenes never show them, though each of their words, and each pair of an object's words, occurs in seen ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import eq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...arguments import check_whole
from ..vocabularies import WORLD
from .classes import ARTICLES, CLASS_WORDS, FIRST_GROUND, GROUNDS, OBJECTS, ON, PREFIXES, SUFFIXES, SYNONYMS
from .drawing import Random, draw_ground, draw_object, light

BASE_SIZE = 96  # pixels; lengths of `Difficulty` are at this size
SPLITS = ("train", "test", "all")
PLACING_ATTEMPTS = 50  # for a scene in which every requested object finds a place

_UNSEEN = frozenset(WORLD.unseen)


@dataclass(frozen=True)
class Difficulty:
    """What makes the world hard; lengths are in pixels of a 96 × 96 scene.

    Attributes:
        objects: fewest and most objects. diameter: smallest and largest, of the circle around an object.
        overlap: share of their two radii by which the circles of two objects may overlap, 0..1.
        siblings: probability that an object differs from the one before it in a single word.
        jitter: of the colours, in levels of 0..255. lighting: largest change of brightness towards one side, 0..1.
        noise: largest standard deviation of the camera noise, in levels of 0..255.
    """

    objects: tuple[int, int] = (2, 4)
    diameter: tuple[float, float] = (34, 58)
    overlap: float = 0.25
    siblings: float = 0.3
    jitter: float = 15
    lighting: float = 0.25
    noise: float = 8


class Region(NamedTuple):
    """A visible object: its class index and the box (left, top, right, bottom) of its pixels, the end exclusive."""

    label: int
    box: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Scene:
    """One image of the world.

    Attributes:
        image: (H, W, 3) uint8, RGB. labels: (H, W) int32, indices into `classes`; every pixel has a class.
        classes: the class list of the world, the same in every scene. ground: index of the ground's class.
        regions: the visible objects. captions: three descriptions: of everything, of a part, and of one thing.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.int32]
    classes: tuple[str, ...]
    ground: int
    regions: tuple[Region, ...]
    captions: tuple[str, ...]


class World:
    """Endless scenes from a seed, which must not be negative (ValueError). Every seed has the same unseen classes."""

    vocabulary = WORLD

    def __init__(self, seed: int = 0, difficulty: Difficulty | None = None) -> None:
        check_whole("seed", seed)
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}.")
        self.seed = seed
        self.difficulty = difficulty or Difficulty()

    def scene(self, index: int, size: int = BASE_SIZE, split: str = "train") -> Scene:
        """Scene number `index`: always the same one, whichever were drawn before.

        Args:
            index: 0, 1, 2, ... without end. size: side in pixels.
            split: `"train"`: seen combinations only; `"test"`, or `"all"` to train on captions: all. None share scenes.

        Raises:
            ValueError: `index` is negative, `size` is under 32, or there is no such split.
        """
        _check_number(index, size)
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
        # Textures draw a number of values that depends on the size: from their own stream, so the rest stays the same.
        rng, grain = (np.random.default_rng([self.seed, SPLITS.index(split), index, part]) for part in range(2))
        return self._draw(*self._contents(split, rng), size, rng, grain)

    def scene_of(self, labels: Sequence[int], index: int = 0, size: int = BASE_SIZE) -> Scene:
        """A scene of exactly these classes, all of them visible.

        Args:
            labels: class indices of one ground and at least one object, in any order.
            index: 0, 1, 2, ... give other places, sizes and tones. size: side in pixels.

        Raises:
            ValueError: other labels, `index` is negative, `size` is under 32, or too many objects to be seen together.
        """
        _check_number(index, size)
        objects = [label for label in labels if 0 <= label < FIRST_GROUND]
        grounds = [label for label in labels if FIRST_GROUND <= label < len(WORLD.classes)]
        if len(objects) + len(grounds) < len(labels) or len(grounds) != 1 or not objects:
            raise ValueError(f"labels must be those of one ground and at least one object, got {list(labels)}.")
        for attempt in range(PLACING_ATTEMPTS):
            parts = (self.seed, len(SPLITS), index, attempt)  # separate from the splits' streams
            rng, grain = (np.random.default_rng([*parts, part]) for part in range(2))
            scene = self._draw(grounds[0], objects, size, rng, grain)
            if {region.label for region in scene.regions} == set(objects):
                return scene
        raise ValueError(f"{len(objects)} objects are too many to be seen together in a scene.")

    def _draw(self, ground: int, objects: list[int], size: int, rng: Random, grain: Random) -> Scene:
        unit, hard = size / BASE_SIZE, self.difficulty
        canvas = draw_ground(size, *GROUNDS[ground - FIRST_GROUND], unit, hard.jitter, grain)
        labels = np.full((size, size), ground, np.int32)
        for label, (x, y, radius) in zip(objects, self._places(len(objects), rng), strict=False):
            placed = (x * unit, y * unit), radius * unit
            window, covered = draw_object(canvas, *placed, OBJECTS[label], unit, hard.jitter, rng)
            labels[window][covered] = label
        image = light(canvas, hard.lighting, hard.noise, rng, grain)
        regions = _visible(labels, objects, unit)
        return Scene(image, labels, WORLD.classes, ground, regions, _captions(ground, regions, rng))

    def _contents(self, split: str, rng: Random) -> tuple[int, list[int]]:
        pool = [index for index in range(len(CLASS_WORDS)) if split != "train" or index not in _UNSEEN]
        ground = int(rng.choice([index for index in pool if index >= FIRST_GROUND]))
        colour = GROUNDS[ground - FIRST_GROUND][0]  # nothing lies on a ground of its own colour
        allowed = [index for index in pool if index < FIRST_GROUND and OBJECTS[index][0] != colour]
        least, most = self.difficulty.objects
        objects: list[int] = []
        for _ in range(int(rng.integers(least, most + 1))):
            candidates = allowed
            if objects and rng.random() < self.difficulty.siblings:
                before = OBJECTS[objects[-1]]
                candidates = [index for index in allowed if sum(map(eq, OBJECTS[index], before)) == 2]
            candidates = [index for index in candidates if index not in objects] or allowed
            objects.append(int(candidates[rng.integers(len(candidates))]))
        return ground, objects

    def _places(self, count: int, rng: Random) -> list[tuple[float, float, float]]:
        """Up to `count` circles (x, y, radius) that overlap no more than allowed; those without room are left out."""
        places: list[tuple[float, float, float]] = []
        smallest, largest = self.difficulty.diameter
        for _ in range(count):
            for attempt in range(12):  # ever smaller, until it fits
                radius = rng.uniform(smallest, largest - (largest - smallest) * attempt / 12) / 2
                x, y = rng.uniform(0.75 * radius, BASE_SIZE - 0.75 * radius, 2)
                if all(np.hypot(x - a, y - b) > (radius + r) * (1 - self.difficulty.overlap) for a, b, r in places):
                    places.append((float(x), float(y), float(radius)))
                    break
        return places


def _check_number(index: int, size: int) -> None:
    check_whole("index", index)
    check_whole("size", size, "pixels")
    if index < 0:
        raise ValueError(f"index must not be negative, got {index}.")
    if size < 32:
        raise ValueError(f"size must be at least 32 pixels, got {size}.")


def phrase(label: int, rng: Random, article: bool = True) -> str:
    """A class in other words: synonyms; for objects an article and either order of colour and pattern."""
    words = [
        _pick(SYNONYMS[word], rng) if word in SYNONYMS and rng.random() < 0.3 else word for word in CLASS_WORDS[label]
    ]
    if label < FIRST_GROUND:
        if rng.random() < 0.3:
            words[0], words[1] = words[1], words[0]
        if article:
            words.insert(0, ARTICLES[words[0][0] in "aeiou"])
    return " ".join(words)


def describe(labels: list[int], rng: Random) -> str:
    """A caption of one or several classes; a ground comes last."""
    objects = [phrase(label, rng) for label in labels if label < FIRST_GROUND]
    grounds = [phrase(label, rng) for label in labels if label >= FIRST_GROUND]
    text = ", ".join(objects[:-1]) + (" and " if len(objects) > 1 else "") + (objects[-1] if objects else "")
    if grounds:
        text = f"{text} {_pick(ON, rng)} {grounds[0]}" if text else grounds[0]
    return _pick(PREFIXES, rng) + text + _pick(SUFFIXES, rng)


def _captions(ground: int, regions: tuple[Region, ...], rng: Random) -> tuple[str, ...]:
    objects = [region.label for region in regions]
    rng.shuffle(objects)
    part = objects[: int(rng.integers(1, len(objects) + 1))] if objects else []
    one = objects[:1] or [ground]
    described = ([*objects, ground], part + [ground] * (rng.random() < 0.5) or one, one)
    return tuple(describe(labels, rng) for labels in described)


def _visible(labels: NDArray[np.int32], objects: list[int], unit: float) -> tuple[Region, ...]:
    regions = []
    for label in dict.fromkeys(objects):
        rows, columns = np.nonzero(labels == label)
        if len(rows) >= 60 * unit**2:  # less is a sliver that nobody would mention
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            regions.append(Region(label, tuple(map(int, box))))  # type: ignore[arg-type]
    return tuple(regions)


def _pick(options: tuple[str, ...], rng: Random) -> str:
    return options[int(rng.integers(len(options)))]


class SceneName(NamedTuple):
    """A scene's name: split, seed of the world and number, `"test-0-17"`."""

    name: str


@dataclass(frozen=True)
class WorldScenes:
    """Scenes of a world as a dataset, read like a `SegmentationDataset`. pairs: names in order; size: side (pixels)."""

    split: str
    pairs: tuple[SceneName, ...]
    seed: int = 0
    size: int = BASE_SIZE
    name = WORLD.name
    vocabulary = WORLD

    @classmethod
    def first(cls, count: int, split: str, seed: int = 0) -> WorldScenes:
        """The first `count` scenes of a split."""
        return cls(split, tuple(SceneName(f"{split}-{seed}-{index}") for index in range(count)), seed)

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Image.Image, NDArray[np.int32]]:
        """An RGB image and its labels (H, W)."""
        number = int(self.pairs[index].name.rpartition("-")[2])
        scene = World(self.seed).scene(number, self.size, self.split)
        return Image.fromarray(scene.image), scene.labels
