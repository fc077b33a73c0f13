"""The steps of `ovseg-fast demo`: choose or draw a scene, segment it by names, measure, write pictures."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..data.vocabularies import WORLD
from ..data.world.scenes import Scene, World
from ..evaluation.metrics import ConfusionMatrix
from ..files import write_whole
from ..segmenter import Segmenter
from ..visualize import label_image
from .page import cost_maps, page
from .words import distractors, meanings, truth, understand_scene

DISTRACTORS = 5  # names of things that are not in the scene, each one word away from one that is
VISIBLE = 0.04  # share of the picture from which a thing is clearly visible
SEARCHED = 2000  # scenes searched for one with two unseen objects; about one in ten has them
PANELS = 20  # names whose maps are in the picture


class Asked(NamedTuple):
    """A scene, where it is from, T names to segment it by, and the world's classes that each name means."""

    scene: Scene
    where: str
    names: list[str]
    meant: list[tuple[int, ...]]


def ask(wish: str | None, typed: list[str] | None, seed: int, size: int) -> Asked:
    """A scene and names for it.

    Args:
        wish: describes the scene; by default it is the seed's first with two unseen objects. size: side in pixels.
        typed: the names; by default those of everything visible in the scene, and distractors.

    Raises:
        ValueError: such a scene does not exist, or two names mean the same.
    """
    world, rng = World(seed), np.random.default_rng(seed)
    if wish is not None:
        try:
            names, labels = understand_scene(wish, rng)
            scene = world.scene_of(labels, size=size)
        except ValueError as error:
            raise ValueError(f"--scene: {error}") from error
        where = f"The described scene, seed {seed}"
        if len(labels) > len(names):
            names.append(WORLD.classes[labels[-1]])
    else:
        number = _first_with_unseen(world)
        scene = world.scene(number, size, "test")
        where = f"Scene {number} of seed {seed}"
        labels = [*(region.label for region in scene.regions), scene.ground]
        names = [WORLD.classes[label] for label in labels]
    if typed is None:
        known = {label for classes in meanings(names) for label in classes}
        names += [WORLD.classes[label] for label in distractors(labels, DISTRACTORS, rng, known)]
    else:
        names = typed
    try:
        return Asked(scene, where, names, meanings(names))
    except ValueError as error:
        raise ValueError(f"--classes: {error}") from error


def _first_with_unseen(world: World) -> int:
    """The number of the first test scene with two clearly visible objects that are never trained on."""
    for number in range(SEARCHED):
        scene = world.scene(number, split="test")  # at the default size, so that every --size shows the same scene
        visible = [region.label for region in scene.regions if (scene.labels == region.label).mean() >= VISIBLE]
        if len(set(visible) & set(WORLD.unseen)) >= 2:
            return number
    where = f"--seed {world.seed}: none of its first {SEARCHED} scenes"
    raise ValueError(f"{where} shows two unseen objects; choose another seed.")


def run(segmenter: Segmenter, asked: Asked, mode: str, out: Path, model: str) -> tuple[list[str], list[Path]]:
    """Segment and measure the scene, write the pictures; returns the lines to print and the files."""
    scene, names, meant = asked.scene, asked.names, asked.meant
    image = Image.fromarray(scene.image)
    known = None
    if segmenter.model.seen_offset is not None and segmenter.model.training_classes == WORLD.name:
        # By meaning, not by name: published inference lowers the scores of what was trained on.
        known = [name for name, classes in zip(names, meant, strict=True) if set(classes) - set(WORLD.unseen)]
    result = segmenter.encode(image, mode).segment(names, seen=known)
    right = truth(scene.labels, meant)

    shown = [sorted(set(scene.labels[right == index].tolist())) for index in range(len(names))]
    unseen = [set(here or classes) <= set(WORLD.unseen) for here, classes in zip(shown, meant, strict=True)]
    matrix = ConfusionMatrix(len(names))
    matrix.update(result.labels, right)
    scores = matrix.scores(seen=[index for index, flag in enumerate(unseen) if not flag])

    rows, notes = [("class", "split", "IoU", "")], []
    for name, classes, here, flag, iou in zip(names, meant, shown, unseen, scores.iou, strict=True):
        said = [WORLD.classes[label] for label in here or (classes if len(classes) == 1 else ())]
        text = name if not said or said == [name] else f"{name} ({', '.join(said)})"
        remark = "" if here else "not in the scene" if classes else "not of this world"
        split = "-" if not classes else "unseen" if flag else "seen"
        rows.append((text, split, _percent(iou) if here else "-", remark))
        notes.append(remark or f"{split}, IoU {100 * iou:.0f} %")
    means = f"mIoU {_percent(scores.miou)}"
    if np.isfinite(scores.hiou):
        means += f"  (unseen {_percent(scores.miou_unseen)}, seen {_percent(scores.miou_seen)})"
    largest = np.argsort(-(scores.truth + scores.predicted), kind="stable")[:PANELS]
    costs = cost_maps(segmenter, image, names)
    things = ", ".join(scene.classes[region.label] for region in scene.regions)
    description = f"{asked.where}: {things} on {scene.classes[scene.ground]}"
    sheet = page(result, right, costs, notes, sorted(largest.tolist()), f"{model}: {means}", description)
    overlay, labels = result.overlay(), label_image(result.labels, len(names))
    out.mkdir(parents=True, exist_ok=True)
    pictures = {"demo": sheet, "demo_scene": image, "demo_overlay": overlay, "demo_labels": labels}
    files = [out / f"{name}.png" for name in pictures]
    for file, picture in zip(files, pictures.values(), strict=True):
        write_whole(file, picture.save)

    if not scores.present.any():
        means = "There is no mIoU: none of the names is in the scene. --scene draws one from your own words."
    width = max(len(name) for name, *_ in rows)
    table = [f"{name:<{width}}  {split:<6}  {iou:>7}  {remark}".rstrip() for name, split, iou, remark in rows]
    lines = [description, "", *table, "", means]
    left_out = [label for label in np.unique(scene.labels).tolist() if not any(label in classes for classes in meant)]
    if left_out:
        things, share = ", ".join(WORLD.classes[label] for label in left_out), _percent((right < 0).mean())
        lines.append(f"Not counted, because no name means it: {things} ({share} of the picture).")
    if len(names) > PANELS:
        lines.append(f"The picture shows the maps of {PANELS} of the {len(names)} names, those with the most pixels.")
    return lines, files


def _percent(ratio: float) -> str:
    return "-" if ratio != ratio else f"{100 * ratio:.1f} %"
