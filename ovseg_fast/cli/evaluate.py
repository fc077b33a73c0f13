"""`ovseg-fast evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import BAD_INPUT, FAILED, device_option, fail, mode_option, weights_option

if TYPE_CHECKING:
    from ..data.datasets import SegmentationDataset

WORLD_SCENES = 500  # of the procedural world, where no limit is given


@click.command("evaluate")
@click.argument("preset", metavar="MODEL")
@weights_option
@click.option(
    "-d",
    "--dataset",
    "layout",
    required=True,
    help="The dataset's name, such as ade20k-150; `folder` for your own, `world` for the procedural world.",
)
@click.option("--root", type=click.Path(path_type=Path), help="The folder that the dataset lies in; `world` has none.")
@click.option("--split", default="val", show_default=True, help="Which part of the dataset.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the procedural world.")
@mode_option
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="A .json file for the result.  [default: out/MODEL_DATASET_SPLIT_MODE.json]",
)
@device_option
@click.option(
    "--seen-offset",
    type=click.FloatRange(0, 1),
    help="What the model subtracts from the probabilities of seen classes (Cascade-CLIP: 0.1 as published, 0 after "
    "transductive training).  [default: the model's]",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many images.")
@click.option(
    "--resume/--restart",
    default=True,
    show_default=True,
    help="Go on where a stopped or killed run came to, or discard that.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress bar and no table.")
@click.pass_obj
def evaluate_command(
    verbose: bool | None,
    preset: str,
    weights: str,
    layout: str,
    root: Path | None,
    split: str,
    seed: int,
    mode: str,
    out: Path | None,
    device: str | None,
    seen_offset: float | None,
    limit: int | None,
    resume: bool,
    quiet: bool,
) -> None:
    """Measure MODEL on a dataset: mIoU, per-class IoU, seen and unseen classes, pixel accuracy.

    \b
    ovseg-fast evaluate catseg-vitb --dataset ade20k-150 --root datasets/
    ovseg-fast evaluate catseg-tiny --dataset world --seed 1

    A run that was stopped or killed goes on when it is started again. Pairs that cannot be used are named and left
    out; the exit code is then 1.
    """
    from ..data.datasets import open_dataset
    from ..data.world.scenes import WorldScenes
    from ..models.presets import get_preset

    try:
        method = get_preset(preset).model
        if seen_offset is not None and method.seen_offset is None:
            raise ValueError(f"--seen-offset is for models that lower seen classes, {preset} does not.")
        dataset: SegmentationDataset | WorldScenes
        if layout == "world":
            split = "test" if split == "val" else split
            dataset = WorldScenes.first(limit or WORLD_SCENES, split, seed)
        elif root is None:
            raise ValueError(f"--root must be the folder that {layout} lies in.")
        else:
            dataset = open_dataset(layout, root, split)
        if not len(dataset):
            raise ValueError(f"--root '{root}' holds no image of {layout}, split {split}.")
        from .. import backends
        from ..evaluation.evaluate import EvaluationError, evaluate
        from ..segmenter import load

        segmenter = load(preset, weights=None if weights == "random" else weights, device=device)
        backends.check(segmenter.device)
        if seen_offset is not None:
            segmenter.model.seen_offset = seen_offset
        target = Path("out", f"{preset}_{layout}_{split}_{mode}.json") if out is None else out
        try:
            result = evaluate(
                segmenter,
                dataset,
                target,
                mode=mode,
                seen=_trained_on(weights, dataset.vocabulary.classes),
                progress=not quiet,
                limit=limit,
                restart=not resume,
            )
        except EvaluationError as error:
            fail(error, verbose, FAILED)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        fail(error, verbose, BAD_INPUT)
    if not quiet:
        click.echo(f"{result.table()}\n\n{target}")
    if result.skipped:
        total = result.images + len(result.skipped)
        click.echo(f"ovseg-fast: {len(result.skipped)} of {total} images were left out.", err=True)
        sys.exit(FAILED)


def _trained_on(weights: str, classes: tuple[str, ...]) -> list[str] | None:
    """Those of the classes that a checkpoint of this package says it was trained on; None where it does not say."""
    if not Path(weights).is_file():
        return None
    from .. import checkpoints
    from ..vocabulary import prompt_name

    trained = checkpoints.classes(weights)
    if trained is None:
        return None
    known = {prompt_name(name).casefold() for name in trained}
    return [name for name in classes if prompt_name(name).casefold() in known]
