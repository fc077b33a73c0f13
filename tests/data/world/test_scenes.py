"""The procedural world: the same from the same seed, labels that say what is drawn, captions that say what is seen."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from ovseg_fast.data.vocabularies import WORLD
from ovseg_fast.data.world import drawing
from ovseg_fast.data.world.classes import (
    ARTICLES,
    COLOURS,
    FIRST_GROUND,
    GROUND_COLOURS,
    GROUNDS,
    MATERIALS,
    OBJECTS,
    ON,
    PATTERNS,
    PREFIXES,
    SHAPES,
    SUFFIXES,
    SYNONYMS,
)
from ovseg_fast.data.world.scenes import Difficulty, Scene, World, phrase

CANONICAL = {synonym: word for word, synonyms in SYNONYMS.items() for synonym in synonyms}


def draw_seed(rng: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=rng))


def same(first: Scene, second: Scene) -> bool:
    return (
        np.array_equal(first.image, second.image)
        and np.array_equal(first.labels, second.labels)
        and first.captions == second.captions
        and first.regions == second.regions
    )


def digest(scene: Scene) -> str:
    return hashlib.sha256(scene.image.tobytes() + scene.labels.tobytes() + repr(scene.captions).encode()).hexdigest()


def named(caption: str) -> set[int]:
    """The classes that a caption names."""
    prefix = max((prefix for prefix in PREFIXES if caption.startswith(prefix)), key=len)
    suffix = max((suffix for suffix in SUFFIXES if caption.endswith(suffix)), key=len)
    text = caption.removeprefix(prefix)
    text = text[: len(text) - len(suffix)]
    for word in (" and ", *(f" {word} " for word in ON)):
        text = text.replace(word, ", ")
    classes = set()
    for thing in text.split(", "):
        words = thing.split()
        if words[0] in ARTICLES:
            assert words[0] == ARTICLES[words[1][0] in "aeiou"]
            name = [CANONICAL.get(word, word) for word in words[1:]]
            name = [*sorted(name[:2], key=lambda word: word not in COLOURS), name[2]]
            classes.add(OBJECTS.index(tuple(name)))
        else:
            name = [CANONICAL.get(word, word) for word in (words[0], " ".join(words[1:]))]
            classes.add(FIRST_GROUND + GROUNDS.index(tuple(name)))
    return classes


def test_same_seed_same_scene_whatever_was_made_before(rng: torch.Generator) -> None:
    seed = draw_seed(rng)
    one, other = World(seed), World(seed)
    forward = [one.scene(index, split="test") for index in range(5)]
    other.scene(7)
    backward = [other.scene(index, split="test") for index in reversed(range(5))]
    assert all(same(a, b) for a, b in zip(forward, reversed(backward), strict=True))


def test_same_scene_in_another_process(rng: torch.Generator) -> None:
    seed = draw_seed(rng)
    code = (
        "import hashlib; from ovseg_fast.data import World; "
        f"s = World({seed}).scene(11); "
        "print(hashlib.sha256(s.image.tobytes() + s.labels.tobytes() + repr(s.captions).encode()).hexdigest())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tempfile.gettempdir(), capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == digest(World(seed).scene(11))


def test_seed_index_and_split_each_give_another_scene(rng: torch.Generator) -> None:
    seed = draw_seed(rng)
    scenes = [World(seed).scene(3), World(seed + 1).scene(3), World(seed).scene(4)]
    scenes += [World(seed).scene(3, split=split) for split in ("test", "all")]
    assert not any(same(a, b) for a, b in combinations(scenes, 2))


def test_there_are_many_classes_and_about_a_quarter_is_unseen() -> None:
    assert len(WORLD.classes) >= 100
    assert 0.2 <= len(WORLD.unseen) / len(WORLD.classes) <= 0.25
    assert "red striped circle" in WORLD.classes
    assert "grey brick wall" in WORLD.classes
    assert WORLD.classes == tuple(" ".join(words) for words in (*OBJECTS, *GROUNDS))


def test_every_word_of_an_unseen_combination_is_in_seen_ones() -> None:
    words = [*OBJECTS, *GROUNDS]
    seen = [name for index, name in enumerate(words) if index not in WORLD.unseen]
    for index in WORLD.unseen:
        name, place = words[index], len(words[index])
        for position in range(place):
            assert sum(len(other) == place and other[position] == name[position] for other in seen) >= 3
        for a, b in combinations(range(place), 2) if place == 3 else ():
            assert any(len(other) == 3 and (other[a], other[b]) == (name[a], name[b]) for other in seen)


def test_scenes_for_training_show_and_say_nothing_unseen(rng: torch.Generator) -> None:
    world, unseen = World(draw_seed(rng)), set(WORLD.unseen)
    for index in range(150):
        scene = world.scene(index)
        assert not unseen & set(np.unique(scene.labels).tolist())
        assert not unseen & set().union(*map(named, scene.captions))


def test_training_scenes_show_every_seen_class_and_test_scenes_every_class(rng: torch.Generator) -> None:
    world = World(draw_seed(rng))
    sizes = {"train": len(WORLD.seen), "test": len(WORLD.classes), "all": len(WORLD.classes)}
    for split, expected in sizes.items():
        found: set[int] = set()
        for index in range(3000):
            found |= set(np.unique(world.scene(index, size=32, split=split).labels).tolist())
            if len(found) == expected:
                break
        assert len(found) == expected


@pytest.mark.parametrize("split", ["train", "test"])
def test_captions_name_only_what_is_visible(split: str, rng: torch.Generator) -> None:
    world = World(draw_seed(rng), Difficulty(objects=(2, 6), overlap=0.8))  # crowded: some objects are covered
    for index in range(100):
        scene = world.scene(index, split=split)
        visible = {region.label for region in scene.regions}
        assert named(scene.captions[0]) == visible | {scene.ground}
        for caption in scene.captions:
            assert named(caption) <= visible | {scene.ground}
        for label in visible:
            assert (scene.labels == label).sum() >= 60


def test_an_object_that_is_all_but_covered_is_not_named() -> None:
    crowded = World(0, Difficulty(objects=(6, 6), diameter=(50, 52), overlap=1.0))
    scenes = [crowded.scene(index) for index in range(60)]
    slivers = [
        label
        for scene in scenes
        for label in np.unique(scene.labels)
        if label != scene.ground and label not in {region.label for region in scene.regions}
    ]
    assert slivers, "no scene puts the rule to the test"


def test_boxes_are_those_of_the_labels(rng: torch.Generator) -> None:
    scene = World(draw_seed(rng)).scene(5, split="test")
    assert scene.regions
    for label, (left, top, right, bottom) in scene.regions:
        mask = scene.labels == label
        assert mask[top:bottom, left:right].sum() == mask.sum()
        for edge in (
            mask[top, left:right],
            mask[bottom - 1, left:right],
            mask[top:bottom, left],
            mask[top:bottom, right - 1],
        ):
            assert edge.any()


def test_colours_are_drawn_where_the_labels_say(rng: torch.Generator) -> None:
    world = World(draw_seed(rng), Difficulty(lighting=0.1, noise=5))
    checked = 0
    for index in range(80):
        scene = world.scene(index, split="test")
        for label, _ in scene.regions:
            colour, pattern, _ = OBJECTS[label]
            if pattern == "plain":
                mean = scene.image[scene.labels == label].mean(0)
                nearest = min(COLOURS, key=lambda name: np.linalg.norm(mean - COLOURS[name]))
                assert nearest == colour
                checked += 1
    assert checked > 20


def test_grounds_have_their_colour(rng: torch.Generator) -> None:
    world = World(draw_seed(rng), Difficulty(lighting=0, noise=0, jitter=0))
    for index in range(60):
        scene = world.scene(index, split="test")
        mean = scene.image[scene.labels == scene.ground].mean(0)
        hues = {name: np.array(rgb) / np.linalg.norm(rgb) for name, rgb in GROUND_COLOURS.items()}
        nearest = max(hues, key=lambda name: float(hues[name] @ mean))
        assert nearest == GROUNDS[scene.ground - FIRST_GROUND][0]


def test_every_word_is_drawn_in_one_way() -> None:
    assert tuple(drawing.SHAPE_DISTANCES) == SHAPES and tuple(drawing.MATERIAL_BRIGHTNESS) == MATERIALS
    assert tuple(drawing.PATTERN_TONES) == tuple(drawing.PERIODS) == PATTERNS


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_object_covers_its_mask_and_nothing_else(shape: str, pattern: str, rng: torch.Generator) -> None:
    canvas = np.full((120, 120, 3), -1000.0, np.float32)
    generator = np.random.default_rng(draw_seed(rng))
    window, mask = drawing.draw_object(canvas, (60.0, 60.0), 40.0, ("green", pattern, shape), 1.0, 5, generator)
    covered = np.zeros((120, 120), bool)
    covered[window] = mask
    colours = canvas[covered & ~_border(covered)]
    assert colours.min() > -1  # fully drawn inside
    assert (canvas[~covered & ~_border(covered)] == -1000).all()  # untouched outside
    area = covered.sum() / (np.pi * 40**2)
    expected = {"circle": 0.81, "square": 0.697, "triangle": 0.4135, "star": 0.4678, "cross": 0.649}
    assert area == pytest.approx(expected[shape], abs=0.02)
    assert (colours.std(0).max() > 30) == (pattern != "plain")  # a pattern has two tones


def _border(mask: np.ndarray) -> np.ndarray:
    """Pixels within two of the mask's edge."""
    near = np.zeros_like(mask)
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            near |= np.roll(mask, (dy, dx), (0, 1)) != mask
    return near


def test_patterns_repeat_with_their_period() -> None:
    x = np.linspace(-40, 40, 161, dtype=np.float32)
    u, v = np.meshgrid(x, x)
    for name, pattern in drawing.PATTERN_TONES.items():
        value = pattern(u, v, 10.0)
        assert value.min() >= 0
        assert value.max() <= 1
        np.testing.assert_allclose(value, pattern(u + 10, v, 10.0), atol=1e-4)
        assert (value.mean() > 0.1) == (name != "plain")
    stripes = drawing.PATTERN_TONES["striped"](u, v, 10.0)
    assert (stripes == stripes[:1]).all()  # along one direction they do not change
    checks = drawing.PATTERN_TONES["checkered"](u, v, 10.0)
    np.testing.assert_allclose(checks, 1 - drawing.PATTERN_TONES["checkered"](u + 5, v, 10.0), atol=1e-4)


@pytest.mark.parametrize("size", [32, 96, 97, 200])
def test_sizes(size: int, rng: torch.Generator) -> None:
    scene = World(draw_seed(rng)).scene(0, size=size)
    assert scene.image.shape == (size, size, 3)
    assert scene.image.dtype == np.uint8
    assert scene.labels.shape == (size, size)
    assert scene.labels.dtype == np.int32
    assert scene.classes == WORLD.classes
    assert scene.labels.min() >= 0


def test_a_larger_scene_shows_the_same(rng: torch.Generator) -> None:
    world = World(draw_seed(rng))
    for index in range(10):
        small, large = world.scene(index, size=96), world.scene(index, size=192)
        assert (small.labels == large.labels[::2, ::2]).mean() > 0.95


def test_difficulty_is_obeyed(rng: torch.Generator) -> None:
    seed = draw_seed(rng)
    for index in range(30):
        assert len(World(seed, Difficulty(objects=(1, 1))).scene(index).regions) == 1
        crowd = World(seed, Difficulty(objects=(3, 3), siblings=1.0, overlap=0.0, diameter=(20, 24)))._contents(
            "train", np.random.default_rng(index)
        )
        ground, objects = crowd
        assert len(set(objects)) == 3
        assert all(sum(a == b for a, b in zip(OBJECTS[x], OBJECTS[y], strict=True)) == 2 for x, y in pairwise(objects))
        assert GROUNDS[ground - FIRST_GROUND][0] not in {OBJECTS[label][0] for label in objects}


def test_objects_do_not_touch_without_overlap(rng: torch.Generator) -> None:
    world = World(draw_seed(rng), Difficulty(overlap=0.0))
    for index in range(20):
        places = world._places(4, np.random.default_rng(index))
        assert places
        assert all(np.hypot(a - c, b - d) >= r + s for (a, b, r), (c, d, s) in combinations(places, 2))


def test_phrases_use_synonyms_and_both_orders() -> None:
    generator = np.random.default_rng(0)
    label = WORLD.classes.index("red striped circle")
    phrases = {phrase(label, generator, article=False) for _ in range(300)}
    assert {"red striped circle", "striped red circle", "crimson banded disc"} <= phrases


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"seed must not be negative, got -1\."):
        World(-1)
    with pytest.raises(ValueError, match=r"index must not be negative, got -2\."):
        World(0).scene(-2)
    with pytest.raises(ValueError, match=r"size must be at least 32 pixels, got 31\."):
        World(0).scene(0, size=31)
    with pytest.raises(ValueError, match=r"split must be one of train, test, all, got 'val'\."):
        World(0).scene(0, split="val")
