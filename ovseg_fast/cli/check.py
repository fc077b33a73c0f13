"""`ovseg-fast check`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from . import options
from .repeats import counted_warnings


@click.command("check")
@click.argument("name", metavar="DATASET")
@click.argument("root", type=options.PATH)
@click.option("--split", default="val", show_default=True, help="Part of the dataset.")
@click.option("--max-side", type=click.IntRange(min=2), help="Largest accepted side in pixels.  [default: 16384]")
@options.quiet()
def check_command(name: str, root: Path, split: str, max_side: int | None, quiet: bool) -> None:
    """Read every image and mask of a dataset and report what is broken or does not fit.

    \b
    ovseg-fast check ade20k-150 datasets/ --split train
    ovseg-fast check folder my_data/

    The exit code is 1 if a problem was found. Notes, such as on classes that no pixel shows, do not count.
    """
    from ..data import examine, open_dataset, report
    from ..images import MAX_SIDE

    with options.exit_on_error(options.BAD_INPUT), counted_warnings():
        dataset = open_dataset(name, root, split, max_side=max_side or MAX_SIDE)
        problems, notes = examine(dataset, progress=not quiet)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"{len(dataset)} pairs: {report(problems)}")
    if problems:
        sys.exit(options.FAILED)
