"""`ovseg-fast evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from . import options
from .repeats import counted_warnings


@click.command("evaluate")
@click.argument("preset", metavar="MODEL")
@options.run_options
@click.option(
    "-d", "--dataset", "name", required=True, help="Such as ade20k-150; `folder` for your own, `world` is procedural."
)
@click.option("--root", type=options.PATH, help="The folder that the dataset lies in; `world` has none.")
@click.option("--split", default="val", show_default=True, help="Part of the dataset.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the procedural world.")
@click.option("-o", "--out", type=options.PATH, help="Result (.json).  [default: out/MODEL_DATASET_SPLIT_MODE.json]")
@click.option(
    "--seen-offset",
    type=options.SHARE,
    help="Subtracted from seen classes' probabilities (Cascade-CLIP: 0.1, transductive 0).  [default: the model's]",
)
@click.option("--limit", type=click.IntRange(min=1), help="Evaluate only the first images, this many.")
@options.max_side
@click.option(
    "--resume/--restart", default=True, show_default=True, help="Resume or discard a run that was stopped or killed."
)
@options.quiet("No progress bar and no table.")
def evaluate_command(
    preset: str,
    weights: str,
    name: str,
    root: Path | None,
    split: str,
    seed: int,
    mode: str,
    out: Path | None,
    device: str | None,
    seen_offset: float | None,
    limit: int | None,
    max_side: int,
    resume: bool,
    quiet: bool,
) -> None:
    """Measure MODEL on a dataset: mIoU, per-class IoU, seen and unseen classes, pixel accuracy.

    \b
    ovseg-fast evaluate catseg-vitb --dataset ade20k-150 --root datasets/
    ovseg-fast evaluate catseg-tiny --dataset world --seed 1

    Started again, a run that was stopped or killed resumes. Pairs that cannot be used are listed and left out; the
    exit code is then 1.
    """
    from ..data import datasets
    from ..models.presets import get_preset

    with options.exit_on_error(options.BAD_INPUT):
        if seen_offset is not None and get_preset(preset).model.seen_offset is None:
            raise ValueError(f"--seen-offset is for models that lower the scores of seen classes, {preset} does not.")
        dataset = datasets.open_dataset(name, root, split, limit=limit, seed=seed, max_side=max_side)
        if not len(dataset):
            raise ValueError(f"--root '{root}' holds no image of {name}, split {split}.")
        from ..evaluation.evaluate import Run, check_target

        target = Path("out", f"{preset}_{name}_{dataset.split}_{mode}.json") if out is None else out
        check_target(target)  # before the model is loaded
        segmenter = options.load_model(preset, weights, device, max_side=max_side)
        if seen_offset is not None:
            segmenter.model.seen_offset = seen_offset
        seen = _trained_on(weights, dataset.vocabulary.classes)
        run = Run(segmenter, dataset, target, mode=mode, seen=seen, limit=limit, restart=not resume, progress=not quiet)
    with options.exit_on_error(options.FAILED), counted_warnings():
        result = run.go(progress=not quiet)
    if not quiet:
        click.echo(f"{result.table()}\n\n{target}")
    if result.skipped:
        total = result.images + len(result.skipped)
        click.echo(f"ovseg-fast: {len(result.skipped)} of {total} images were left out.", err=True)
        sys.exit(options.FAILED)


def _trained_on(weights: str, classes: tuple[str, ...]) -> list[str] | None:
    """The classes that a checkpoint of this package says it was trained on; None if it does not say."""
    from .. import checkpoints
    from ..vocabulary import prompt_name

    trained = checkpoints.classes(weights) if Path(weights).is_file() else None
    if trained is None:
        return None
    known = {prompt_name(name).casefold() for name in trained}
    return [name for name in classes if prompt_name(name).casefold() in known]
