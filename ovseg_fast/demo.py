"""`ovseg-fast demo`: a scene with things that no model was trained on, segmented by words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from ._command import BAD_INPUT, FAILED, fail

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .data.world import Scene, World
    from .evaluation.metrics import Scores
    from .segmenter import Segmenter

DISTRACTORS = 5  # names of things that are not in the scene, each one word away from one that is
VISIBLE = 0.04  # of the picture: what covers less is not well visible
SEARCHED = 2000  # scenes looked through for one with two unseen objects; about one in ten is
PANELS = 20  # names with maps of their own in the picture
MAX_SIZE = 1536  # pixels


@click.command("demo")
@click.option("-c", "--classes", help='Your own words: "violet spotted plus, striped red square, planks".')
@click.option("--scene", "wish", help='What to show: "violet spotted plus and red star on water".')
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Another seed, another scene.")
@click.option(
    "--size", type=click.IntRange(32, MAX_SIZE), default=192, show_default=True, help="Side of the scene in pixels."
)
@click.option("-m", "--model", "preset", default="catseg-tiny", show_default=True, help="A model; `info` lists them.")
@click.option(
    "-w",
    "--weights",
    default="published",
    show_default=True,
    help="A checkpoint file, `published` (those of the tiny models come with the package), or `random`.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default="out/demo",
    show_default=True,
    help="Folder for the results.",
)
@click.option(
    "--mode",
    type=click.Choice(["slide", "whole"]),
    default="slide",
    show_default=True,
    help="Sliding windows as published, or the resized image in one pass.",
)
@click.option("--device", help="cpu, cuda, cuda:1, ...  [default: a GPU where there is one]")
@click.pass_obj
def demo_command(
    verbose: bool | None,
    classes: str | None,
    wish: str | None,
    seed: int,
    size: int,
    preset: str,
    weights: str,
    out: Path,
    mode: str,
    device: str | None,
) -> None:
    """Make a scene with things never trained on, segment it by words, and measure how well.

    \b
    ovseg-fast demo
    ovseg-fast demo --scene "violet spotted plus and red star on water"
    ovseg-fast demo --classes "purple dotted cross, striped red square, brown wooden floor"

    The scene comes from a small procedural world: objects of a colour, a pattern and a shape on a ground of a colour
    and a material. Without --scene it is the first one of the seed with at least two well visible objects whose
    combination of words is not in the training scenes. Without --classes the names are those of everything in the
    scene, and of some things that differ from them in one word.
    """
    # Heavy imports wait until they are needed, so that the help comes at once.
    from .models.presets import get_preset
    from .vocabulary import parse_classes

    try:
        typed = None if classes is None else parse_classes(classes)
        get_preset(preset)
        folder = next(path for path in (out, *out.absolute().parents) if path.exists())
        if not folder.is_dir():
            raise ValueError(f"--out must be a folder, {folder} is a file.")
        asked = _ask(wish, typed, seed, size)

        from . import backends
        from .segmenter import load

        segmenter = load(preset, weights=None if weights == "random" else weights, device=device)
        backends.check(segmenter.device)
        segmenter.embed_text(asked.names)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        fail(error, verbose, BAD_INPUT)
    try:
        lines, files = _run(segmenter, asked, mode, out, preset)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        fail(error, verbose, FAILED)
    click.echo("\n".join([*lines, "", *map(str, files)]))
    if weights == "random":
        click.echo("The weights of this model are random: everything runs, but pictures and numbers mean nothing.")


class _Asked(NamedTuple):
    """What is to be segmented by which names.

    Attributes: scene; where: it is from. names: T of them. meant: the world's classes that each one means.
    """

    scene: Scene
    where: str
    names: list[str]
    meant: list[tuple[int, ...]]


def _ask(wish: str | None, typed: list[str] | None, seed: int, size: int) -> _Asked:
    import numpy as np

    from .data.world import WORLD, World
    from .data.world_words import distractors, meanings, understand_scene

    world, rng = World(seed), np.random.default_rng(seed)
    if wish is not None:
        try:
            names, labels = understand_scene(wish, rng)
            scene = world.scene_of(labels, size=size)
        except ValueError as error:
            raise ValueError(f"--scene: {error}") from error
        where = f"The wanted scene, seed {seed}"
        if len(labels) > len(names):
            names.append(WORLD.classes[labels[-1]])
    else:
        number = _first_with_unseen(world)
        scene = world.scene(number, size, "test")
        where = f"Scene {number} of seed {seed}"
        labels = [*(region.label for region in scene.regions), scene.ground]
        names = [WORLD.classes[label] for label in labels]
    if typed is None:
        named = {label for classes in meanings(names) for label in classes}
        others = distractors(labels, DISTRACTORS, rng)
        names += [WORLD.classes[label] for label in others if label not in named]
    else:
        names = typed
    try:
        return _Asked(scene, where, names, meanings(names))
    except ValueError as error:
        raise ValueError(f"--classes: {error}") from error


def _first_with_unseen(world: World) -> int:
    """The number of the first test scene with two well visible objects that are never trained on."""
    from .data.world import WORLD

    for number in range(SEARCHED):
        scene = world.scene(number, split="test")  # at the usual size, so that a size shows the same scene as another
        visible = [region.label for region in scene.regions if (scene.labels == region.label).mean() >= VISIBLE]
        if len(set(visible) & set(WORLD.unseen)) >= 2:
            return number
    raise ValueError(
        f"--seed {world.seed}: none of its first {SEARCHED} scenes shows two unseen objects; take another."
    )


def _run(segmenter: Segmenter, asked: _Asked, mode: str, out: Path, model: str) -> tuple[list[str], list[Path]]:
    """Segment and measure the scene, write the pictures; returns the lines to print and the files."""
    import numpy as np
    from PIL import Image

    from ._demo_page import cost_maps, page
    from .data.world import WORLD
    from .data.world_words import truth
    from .evaluation.metrics import ConfusionMatrix
    from .files import write_whole
    from .models import CascadeCLIP
    from .visualize import label_image

    scene, names, meant = asked.scene, asked.names, asked.meant
    image = Image.fromarray(scene.image)
    known = None
    if isinstance(segmenter.model, CascadeCLIP) and segmenter.model.config.training_classes == WORLD.name:
        # By meaning, not by name: published inference lowers the scores of what was trained on.
        known = [name for name, classes in zip(names, meant, strict=True) if set(classes) - set(WORLD.unseen)]
    result = segmenter.encode(image, mode).segment(names, seen=known)
    right = truth(scene.labels, meant)

    shown = [sorted(set(scene.labels[right == index].tolist())) for index in range(len(names))]
    unseen = [set(here or classes) <= set(WORLD.unseen) for here, classes in zip(shown, meant, strict=True)]
    matrix = ConfusionMatrix(len(names))
    matrix.update(result.labels, right)
    scores = matrix.scores(seen=[index for index, flag in enumerate(unseen) if not flag])

    splits = [("unseen" if flag else "seen") if classes else "-" for flag, classes in zip(unseen, meant, strict=True)]
    notes = [
        f"{split}, IoU {100 * iou:.0f} %" if here else ("not in the scene" if classes else "not of this world")
        for split, iou, here, classes in zip(splits, scores.iou, shown, meant, strict=True)
    ]
    largest = np.argsort(-(scores.truth + scores.predicted), kind="stable")[:PANELS]
    title = f"{model}: mIoU {_percent(scores.miou)}"
    if np.isfinite(scores.hiou):
        title += f"  (unseen {_percent(scores.miou_unseen)}, seen {_percent(scores.miou_seen)})"
    sheet = page(
        result, right, cost_maps(segmenter, image, names), notes, sorted(largest.tolist()), title, _describe(asked)
    )
    overlay, labels = result.overlay(), label_image(result.labels, len(names))
    out.mkdir(parents=True, exist_ok=True)
    pictures = {"demo": sheet, "demo_scene": image, "demo_overlay": overlay, "demo_labels": labels}
    files = [out / f"{name}.png" for name in pictures]
    for file, picture in zip(files, pictures.values(), strict=True):
        write_whole(file, picture.save)

    lines = [_describe(asked), "", *_table(names, meant, shown, splits, scores)]
    left_out = [label for label in np.unique(scene.labels).tolist() if not any(label in classes for classes in meant)]
    if left_out:
        things = ", ".join(WORLD.classes[label] for label in left_out)
        share = 100 * float((right < 0).mean())
        lines.append(f"Not counted, for no name means it: {things} ({share:.1f} % of the picture).")
    if len(names) > PANELS:
        lines.append(f"The picture shows maps of {PANELS} of the {len(names)} names, those of the most pixels.")
    return lines, files


def _describe(asked: _Asked) -> str:
    scene = asked.scene
    things = ", ".join(scene.classes[region.label] for region in scene.regions)
    return f"{asked.where}: {things} on {scene.classes[scene.ground]}"


def _table(
    names: Sequence[str],
    meant: Sequence[Sequence[int]],
    shown: Sequence[Sequence[int]],
    splits: Sequence[str],
    scores: Scores,
) -> list[str]:
    from .data.world import WORLD

    rows = []
    for name, classes, here, split, iou in zip(names, meant, shown, splits, scores.iou, strict=True):
        said = [WORLD.classes[label] for label in here or (classes if len(classes) == 1 else ())]
        text = name if not said or said == [name] else f"{name} ({', '.join(said)})"
        remark = "" if here else "not in the scene" if classes else "not of this world"
        rows.append((text, split, _percent(iou) if here else "-", remark))
    width = max(len(row[0]) for row in (*rows, ("class",)))
    table = [("class", "split", "IoU", ""), *rows]
    lines = [f"{text:<{width}}  {split:<6}  {iou:>7}  {remark}".rstrip() for text, split, iou, remark in table]
    mean = f"mIoU {_percent(scores.miou)}"
    if not scores.present.any():
        mean = "There is no mIoU: none of the names is in the scene. --scene makes one of your own words."
    return [*lines, "", mean]


def _percent(ratio: float) -> str:
    return "-" if ratio != ratio else f"{100 * ratio:.1f} %"
